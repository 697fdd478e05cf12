package skipstone.sample

import java.io.Closeable
import org.pytorch.executorch.EValue
import org.pytorch.executorch.ExecuTorchRuntime
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * The bundle's .pte: its methods as plain functions over rows, hidden states being float32 [n, hiddenSize].
 *
 * ExecuTorch's Android library gives every method its own memory, so a segment's K/V live in that segment's method. For
 * chains that is enough: no layer belongs to two segments, and accepted rows stand where they belong already. `compact`,
 * which moves the accepted rows of a tree, would move its own copy, so it is not called here.
 *
 * Throws [BundleException] where the file is damaged, does not fit its manifest, or was lowered for a delegate that the
 * library does not have.
 */
class Program(val bundle: Bundle, numThreads: Int = 0) : Closeable {
    private val module: Module = load(bundle, numThreads)

    init {
        var ready = false
        try {
            loadMethods()
            rehearse()
            ready = true
        } finally {
            if (!ready) module.destroy()
        }
    }

    /** Token ids → hidden states before the first layer; 1 to `maxWidth` rows. */
    fun embed(tokens: IntArray): FloatArray {
        val ids = LongArray(tokens.size) { tokens[it].toLong() }
        val values = tokens.size.toLong() * bundle.hiddenSize
        return call("embed", values, Tensor.fromBlob(ids, longArrayOf(1, tokens.size.toLong())))
    }

    /**
     * Run rows through a segment's layers. The rows stand at positions start, start + 1, … behind the rows run before;
     * their K and V are kept, over those of rows that stood there.
     */
    fun segment(index: Int, hidden: FloatArray, start: Int): FloatArray =
        padded(hidden).let { chain(index, it, start, mask(it.size / bundle.hiddenSize, 1)) }.copyOf(hidden.size)

    /** Most likely token after each row. */
    fun bestTokens(hidden: FloatArray): IntArray = bestRows("head", bundle.vocabSize, hidden)

    /** Most likely token of the draft vocabulary after each row. */
    fun bestDraftTokens(hidden: FloatArray): IntArray {
        val rows = bestRows("draft_head", bundle.draftVocabulary.size, hidden)
        return IntArray(rows.size) { bundle.draftVocabulary[rows[it]] }
    }

    override fun close() = module.destroy()

    private fun loadMethods() {
        val found = told("${bundle.program}: names no methods") { module.getMethods().toSet() }
        if (found != bundle.methods) {
            throw BundleException(
                "${bundle.program} has the methods ${found.sorted()}; the manifest names ${bundle.methods.sorted()}; " +
                    "export or copy the bundle again"
            )
        }
        for (name in bundle.methods - "compact") told("${bundle.program}: method $name") { module.loadMethod(name) }
    }

    /**
     * Every method once, at the manifest's bounds, because the library does not tell a program's shapes. ExecuTorch refuses
     * an input of more values than the program's largest: a batch that is too wide, and then a mask over more slots than
     * there are. Later calls do not show the slots, and the operator that keeps K and V ends the process at one that is not
     * there. What this writes is written over by a prompt.
     */
    private fun rehearse() {
        val widest = bundle.maxWidth
        if (takes(widest + 1)) {
            throw BundleException(
                "${bundle.program}: takes batches of more than $widest rows, the manifest's program.max_width; " +
                    "export or copy the bundle again"
            )
        }
        val row = embed(IntArray(widest)).copyOf(bundle.hiddenSize)
        val whole = mask(widest, bundle.slots)
        val exits = (0 until bundle.numSegments).runningFold(row) { hidden, k -> chain(k, hidden, 0, whole) }
        if (bundle.draftVocabulary.isNotEmpty()) bestDraftTokens(exits[1])
        bestTokens(exits.last())
    }

    private fun takes(rows: Int): Boolean =
        try {
            embed(IntArray(rows))
            true
        } catch (error: BundleException) {
            false
        }

    /** A chain's mask is not read, but a tensor must be given. */
    private fun mask(rows: Int, slots: Int): Tensor =
        Tensor.fromBlob(FloatArray(rows * slots), longArrayOf(rows.toLong(), slots.toLong()))

    /** Rows in the slots from `start` on, through a segment. */
    private fun chain(index: Int, hidden: FloatArray, start: Int, mask: Tensor): FloatArray {
        val width = hidden.size / bundle.hiddenSize
        val places = LongArray(width) { (start + it).toLong() }
        val row = longArrayOf(1, width.toLong())
        return call(
            "segment_$index",
            hidden.size.toLong(),
            rows(hidden),
            Tensor.fromBlob(places, row), // positions
            Tensor.fromBlob(places, row), // slots
            Tensor.fromBlob(longArrayOf(start.toLong()), longArrayOf(1)),
            mask,
            Tensor.fromBlob(longArrayOf(CHAIN), longArrayOf(1)),
        )
    }

    private fun bestRows(head: String, columns: Int, hidden: FloatArray): IntArray {
        val wide = padded(hidden)
        val logits = call(head, wide.size.toLong() / bundle.hiddenSize * columns, rows(wide))
        return IntArray(hidden.size / bundle.hiddenSize) { row ->
            val first = row * columns
            var best = first
            for (place in first until first + columns) if (logits[place] > logits[best]) best = place
            best - first
        }
    }

    /** The method's output, which must hold so many values. */
    private fun call(method: String, expected: Long, vararg inputs: Tensor): FloatArray {
        val values = Array(inputs.size) { EValue.from(inputs[it]) }
        val out = told("${bundle.program}: $method") { module.execute(method, *values)[0].toTensor().dataAsFloatArray }
        if (out.size.toLong() == expected) return out
        throw BundleException(
            "${bundle.program}: $method gave ${out.size} values; by the manifest it gives $expected; " +
                "export or copy the bundle again"
        )
    }

    private fun rows(hidden: FloatArray): Tensor {
        val width = (hidden.size / bundle.hiddenSize).toLong()
        return Tensor.fromBlob(hidden, longArrayOf(1, width, bundle.hiddenSize.toLong()))
    }

    /**
     * The last row repeated up to the reference width. Padding stands behind every row of the batch, so none sees it, and
     * its K and V are overwritten by the rows that come to stand there.
     */
    private fun padded(hidden: FloatArray): FloatArray {
        val size = bundle.hiddenSize
        val width = maxOf(hidden.size / size, bundle.referenceWidth)
        val wide = hidden.copyOf(width * size)
        for (place in hidden.size until wide.size) wide[place] = wide[place - size]
        return wide
    }

    private companion object {
        const val CHAIN = 0L

        /** Targets as a manifest names them, and the delegate that runs each. */
        val DELEGATES = mapOf("xnnpack" to "XnnpackBackend", "vulkan" to "VulkanBackend", "coreml" to "CoreMLBackend")

        fun load(bundle: Bundle, numThreads: Int): Module {
            val registered = told("ExecuTorch names no delegates") { ExecuTorchRuntime.getRegisteredBackends() }
            if (DELEGATES[bundle.target] !in registered) {
                val present = DELEGATES.filterValues { it in registered }.keys
                throw BundleException(
                    "${bundle.program}: lowered for ${bundle.target}; this app's ExecuTorch runs $present; export with " +
                        "--device android-cpu, or build the app with a library that has the delegate"
                )
            }
            return told("${bundle.program}: cannot be loaded") {
                Module.load(bundle.program.absolutePath, Module.LOAD_MODE_MMAP, numThreads)
            }
        }

        /** What the library throws, as an error that says what was tried. */
        inline fun <T> told(what: String, action: () -> T): T =
            try {
                action()
            } catch (error: RuntimeException) {
                throw BundleException("$what: ${error.message}")
            }
    }
}
