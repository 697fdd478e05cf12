package skipstone.sample

import java.io.Closeable
import java.nio.FloatBuffer
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * The bundle's .pte: its methods as plain functions over rows, hidden states being float32 [n, hiddenSize].
 *
 * ExecuTorch's Android library gives every method its own memory, so a segment's K/V live in that segment's method. For
 * chains that is enough: no layer belongs to two segments, and accepted rows stand where they belong already. `compact`,
 * which moves the accepted rows of a tree, would move its own copy, so it is not called here.
 */
class Program(val bundle: Bundle, numThreads: Int = 0) : Closeable {
    private val module: Module = load(bundle, numThreads)
    private val masks = HashMap<Int, FloatBuffer>()

    init {
        val found = module.getMethods().toSet()
        if (found != bundle.methods) {
            module.destroy()
            throw BundleException("${bundle.program} has the methods ${found.sorted()}; the manifest names ${bundle.methods.sorted()}")
        }
        bundle.methods.filter { it != "compact" }.forEach(module::loadMethod)
    }

    /** Token ids → hidden states before the first layer; 1 to `maxWidth` rows. */
    fun embed(tokens: IntArray): FloatArray {
        val ids = LongArray(tokens.size) { tokens[it].toLong() }
        return call("embed", Tensor.fromBlob(ids, longArrayOf(1, tokens.size.toLong())))
    }

    /**
     * Run rows through a segment's layers. The rows stand at positions start, start + 1, … behind the rows run before;
     * their K and V are kept, over those of rows that stood there.
     */
    fun segment(index: Int, hidden: FloatArray, start: Int): FloatArray {
        val wide = padded(hidden)
        val width = wide.size / bundle.hiddenSize
        val places = LongArray(width) { (start + it).toLong() }
        val row = longArrayOf(1, width.toLong())
        val out =
            call(
                "segment_$index",
                rows(wide),
                Tensor.fromBlob(places, row), // positions
                Tensor.fromBlob(places, row), // slots
                Tensor.fromBlob(longArrayOf(start.toLong()), longArrayOf(1)),
                Tensor.fromBlob(mask(width), longArrayOf(width.toLong(), bundle.slots.toLong())),
                Tensor.fromBlob(longArrayOf(CHAIN), longArrayOf(1)),
            )
        return out.copyOf(hidden.size)
    }

    /** Most likely token after each row. */
    fun bestTokens(hidden: FloatArray): IntArray = bestRows("head", hidden)

    /** Most likely token of the draft vocabulary after each row. */
    fun bestDraftTokens(hidden: FloatArray): IntArray {
        val rows = bestRows("draft_head", hidden)
        return IntArray(rows.size) { bundle.draftVocabulary[rows[it]] }
    }

    override fun close() = module.destroy()

    private fun bestRows(head: String, hidden: FloatArray): IntArray {
        val wide = padded(hidden)
        val logits = call(head, rows(wide))
        val columns = logits.size / (wide.size / bundle.hiddenSize)
        return IntArray(hidden.size / bundle.hiddenSize) { row ->
            val first = row * columns
            var best = first
            for (place in first until first + columns) if (logits[place] > logits[best]) best = place
            best - first
        }
    }

    private fun call(method: String, vararg inputs: Tensor): FloatArray {
        val values = Array(inputs.size) { EValue.from(inputs[it]) }
        return module.execute(method, *values)[0].toTensor().dataAsFloatArray
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

    /** A chain's mask is not read, but a tensor must be given. */
    private fun mask(width: Int): FloatBuffer =
        masks.getOrPut(width) { Tensor.allocateFloatBuffer(width * bundle.slots) }

    private companion object {
        const val CHAIN = 0L

        fun load(bundle: Bundle, numThreads: Int): Module =
            try {
                Module.load(bundle.program.absolutePath, Module.LOAD_MODE_MMAP, numThreads)
            } catch (error: RuntimeException) {
                throw BundleException("${bundle.program}: cannot be loaded: ${error.message}")
            }
    }
}
