package skipstone.sample

/**
 * @property draftLength drafts per round; 0 is plain decoding.
 */
class Limits(val maxNewTokens: Int, val draftLength: Int)

/**
 * @property tokens the end token included, where there was one.
 * @property accepted drafts that became tokens.
 * @property prefillSeconds up to the first token.
 * @property decodeSeconds all the others.
 */
class Generation(
    val tokens: List<Int>,
    val rounds: Int,
    val drafted: Int,
    val accepted: Int,
    val prefillSeconds: Double,
    val decodeSeconds: Double,
)

/**
 * Greedy decoding: plain, or drafted by the first segment and verified by the rest. The same loop as generate.cpp of the
 * C++ runner.
 *
 * Throws [BundleException] where the prompt is empty or names no token, or the text would not fit the context.
 *
 * @param onTokens called with all tokens so far after every round.
 */
fun generate(program: Program, prompt: IntArray, limits: Limits, onTokens: (List<Int>) -> Unit = {}): Generation {
    check(program.bundle, prompt, limits)
    val decoder = Decoder(program, limits)
    val started = System.nanoTime()
    decoder.prefill(prompt)
    val prefilled = System.nanoTime()
    onTokens(decoder.tokens)
    while (!decoder.done) {
        decoder.round()
        onTokens(decoder.tokens)
    }
    return decoder.result((prefilled - started) / 1e9, (System.nanoTime() - prefilled) / 1e9)
}

private fun check(bundle: Bundle, prompt: IntArray, limits: Limits) {
    if (prompt.isEmpty()) throw BundleException("an empty prompt")
    val alien = prompt.find { it !in 0 until bundle.vocabSize }
    if (alien != null) throw BundleException("token $alien is not in the vocabulary of ${bundle.vocabSize}")
    if (limits.maxNewTokens < 1) throw BundleException("${limits.maxNewTokens} new tokens; expected at least 1")
    if (limits.draftLength > 0 && bundle.draftVocabulary.isEmpty()) {
        throw BundleException("the bundle has no inner exit to draft at")
    }
    if (limits.draftLength !in 0 until bundle.maxWidth) {
        throw BundleException("${limits.draftLength} drafts per round; expected 0 to ${bundle.maxWidth - 1}")
    }
    // The last token is never run. Padding needs slots behind the last row.
    val most = minOf(bundle.capacity, bundle.slots - (bundle.referenceWidth - 1))
    if (prompt.size.toLong() + limits.maxNewTokens - 1 > most) {
        throw BundleException(
            "the prompt's ${prompt.size} tokens and ${limits.maxNewTokens} new ones do not fit the context of $most"
        )
    }
}

/** One text being continued. `pending` is chosen already but has not been run: it is the first row of the next round. */
private class Decoder(private val program: Program, private val limits: Limits) {
    val tokens = ArrayList<Int>()
    private val hiddenSize = program.bundle.hiddenSize
    private var length = 0 // rows that are context
    private var pending = 0
    private var ended = false
    private var rounds = 0
    private var drafted = 0
    private var accepted = 0

    val done: Boolean
        get() = ended || tokens.size >= limits.maxNewTokens

    /** Runs the prompt in batches; the last row chooses the first token. */
    fun prefill(prompt: IntArray) {
        var last = FloatArray(0)
        for (from in prompt.indices step program.bundle.maxWidth) {
            val batch = prompt.copyOfRange(from, minOf(from + program.bundle.maxWidth, prompt.size))
            last = run(0, program.embed(batch), from)
        }
        length = prompt.size
        pending = program.bestTokens(last.copyOfRange(last.size - hiddenSize, last.size))[0]
        emit(pending)
    }

    /**
     * LayerSkip (Elhoushi et al. 2024, section 4.3), greedy: the first segment drafts token by token, the rest verifies all
     * rows in one batch that goes on from the drafting rows' hidden states. A draft is accepted while it equals the token
     * the last layer chose after the row before it; that layer's next choice is the round's own token.
     */
    fun round() {
        val (drafts, rows) = draft()
        val chosen = program.bestTokens(run(1, rows, length))
        var kept = 0
        while (kept < drafts.size && drafts[kept] == chosen[kept]) kept++
        val before = tokens.size
        for (row in 0..kept) if (!done) emit(chosen[row])
        // Accepted rows stand where they belong already; rejected ones lie behind the context and will be overwritten.
        length += kept + 1
        pending = chosen[kept]
        rounds += 1
        drafted += drafts.size
        accepted += minOf(tokens.size - before, kept)
    }

    fun result(prefillSeconds: Double, decodeSeconds: Double) =
        Generation(tokens, rounds, drafted, accepted, prefillSeconds, decodeSeconds)

    /** The drafts after the pending token, and the hidden states of both behind the first segment. */
    private fun draft(): Pair<List<Int>, FloatArray> {
        // A round gives one more token than its drafts.
        val wanted = minOf(limits.draftLength, limits.maxNewTokens - tokens.size - 1)
        val rows = FloatArray((wanted + 1) * hiddenSize)
        val drafts = ArrayList<Int>(wanted)
        var token = pending
        for (place in 0..wanted) {
            val row = program.segment(0, program.embed(intArrayOf(token)), length + place)
            row.copyInto(rows, place * hiddenSize)
            if (place < wanted) {
                token = program.bestDraftTokens(row)[0]
                drafts.add(token)
            }
        }
        return drafts to rows
    }

    /** Rows through the segments from `first` on. */
    private fun run(first: Int, rows: FloatArray, start: Int): FloatArray =
        (first until program.bundle.numSegments).fold(rows) { hidden, k -> program.segment(k, hidden, start) }

    private fun emit(token: Int) {
        tokens.add(token)
        ended = token in program.bundle.eosTokenIds
    }
}
