package org.pytorch.executorch

import java.io.DataInputStream
import java.io.DataOutputStream
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * Stand-ins for the classes of ExecuTorch's Android library, as far as the app uses them, with the library's names and
 * types: on a desktop JVM they hand every call over standard input and output to a process that has the runtime.
 *
 * Messages, big-endian: "backends", answered by the delegates' names; "load" and the file's path, answered by the methods'
 * names; or a method's name and its inputs, answered by one float32 output. An input is its type's code in the library (4 int64, 6 float32), its sizes and its
 * values in little-endian order. Every answer opens with a byte, 0 for an error and its text.
 */
class ExecuTorchRuntime private constructor() {
    companion object {
        @JvmStatic
        fun getRegisteredBackends(): Array<String> {
            Pipe.out.writeUTF("backends")
            return Pipe.names().toTypedArray()
        }
    }
}

class Module private constructor(path: String) {
    private val names: List<String>

    init {
        Pipe.out.writeUTF("load")
        Pipe.out.writeUTF(path)
        names = Pipe.names()
    }

    fun getMethods(): Array<String> = names.toTypedArray()

    fun loadMethod(methodName: String) {
        if (methodName !in names) throw IllegalArgumentException("no method $methodName")
    }

    fun execute(methodName: String, vararg inputs: EValue): Array<EValue> {
        Pipe.out.writeUTF(methodName)
        Pipe.out.writeInt(inputs.size)
        for (value in inputs) value.toTensor().write(Pipe.out)
        Pipe.answer()
        return arrayOf(EValue.from(Tensor.read(Pipe.input)))
    }

    fun destroy() = Unit

    companion object {
        const val LOAD_MODE_MMAP = 1

        @JvmStatic
        fun load(modelPath: String, loadMode: Int = 0, numThreads: Int = 0): Module {
            require(loadMode in 0..3 && numThreads >= 0) { "mode $loadMode, $numThreads threads" }
            return Module(modelPath)
        }
    }
}

class EValue private constructor(private val tensor: Tensor) {
    fun toTensor(): Tensor = tensor

    companion object {
        @JvmStatic fun from(tensor: Tensor): EValue = EValue(tensor)
    }
}

class Tensor private constructor(private val dtype: Int, private val shape: LongArray, private val data: Buffer) {
    val dataAsFloatArray: FloatArray
        get() = FloatArray(data.capacity()).also { (data as FloatBuffer).duplicate().rewind().get(it) }

    internal fun write(out: DataOutputStream) {
        out.writeByte(dtype)
        out.writeInt(shape.size)
        shape.forEach(out::writeLong)
        val bytes = little(data.capacity() * if (dtype == INT64) Long.SIZE_BYTES else Float.SIZE_BYTES)
        when (data) {
            is LongBuffer -> bytes.asLongBuffer().put(data.duplicate().rewind())
            is FloatBuffer -> bytes.asFloatBuffer().put(data.duplicate().rewind())
        }
        out.write(bytes.array())
    }

    companion object {
        private const val INT64 = 4
        private const val FLOAT = 6

        @JvmStatic
        fun fromBlob(data: LongArray, shape: LongArray): Tensor = of(INT64, shape, LongBuffer.wrap(data.copyOf()))

        @JvmStatic
        fun fromBlob(data: FloatArray, shape: LongArray): Tensor = of(FLOAT, shape, FloatBuffer.wrap(data.copyOf()))

        internal fun read(input: DataInputStream): Tensor {
            val shape = LongArray(input.readInt()) { input.readLong() }
            val bytes = little(shape.fold(Float.SIZE_BYTES) { size, n -> size * n.toInt() })
            input.readFully(bytes.array())
            return Tensor(FLOAT, shape, bytes.asFloatBuffer())
        }

        private fun of(dtype: Int, shape: LongArray, data: Buffer): Tensor {
            require(shape.fold(1L, Long::times) == data.capacity().toLong()) { "${data.capacity()} values for ${shape.toList()}" }
            return Tensor(dtype, shape.copyOf(), data)
        }

        private fun little(size: Int): ByteBuffer = ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN)
    }
}

private object Pipe {
    val input = DataInputStream(System.`in`.buffered())
    val out = DataOutputStream(System.out.buffered())

    fun names(): List<String> {
        answer()
        return List(input.readInt()) { input.readUTF() }
    }

    fun answer() {
        out.flush()
        if (input.readByte() == 0.toByte()) throw RuntimeException(input.readUTF())
    }
}
