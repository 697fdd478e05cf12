package skipstone.sample

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.security.MessageDigest
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.longOrNull

/** A bundle that cannot be used, or a request that it cannot serve; the message is for the user. */
class BundleException(message: String) : Exception(message)

/**
 * A bundle's folder: manifest.json and the files it names, checked before anything is run.
 *
 * @property program the .pte.
 * @property capacity positions: the program's slots, or the model's context where that is shorter.
 * @property slots slots of K/V in the program.
 * @property maxWidth most rows of a call.
 * @property referenceWidth fewest rows of a call; narrower batches are padded.
 * @property draftVocabulary token id of every row of the draft head; empty without one.
 */
class Bundle(
    val program: File,
    val tokenizer: File,
    val hiddenSize: Int,
    val vocabSize: Int,
    val numSegments: Int,
    val capacity: Int,
    val slots: Int,
    val maxWidth: Int,
    val referenceWidth: Int,
    val eosTokenIds: Set<Int>,
    val draftVocabulary: IntArray,
    val methods: Set<String>,
) {
    companion object {
        private const val SCHEMA_VERSION = 1

        /** Reads and checks a bundle of format "executorch", schema version 1. Throws [BundleException]. */
        fun open(folder: File): Bundle {
            val path = File(folder, "manifest.json")
            if (!path.isFile) throw BundleException("$path: no such file")
            try {
                return read(folder, Manifest(Json.parseToJsonElement(path.readText())))
            } catch (error: SerializationException) {
                throw BundleException("$path: not JSON: ${error.message?.lines()?.first()}")
            } catch (error: BundleException) {
                throw BundleException("$path: ${error.message}")
            }
        }

        private fun read(folder: File, manifest: Manifest): Bundle {
            val format = manifest.text("format")
            if (format != "executorch") throw BundleException("format is \"$format\"; expected \"executorch\"")
            manifest.integer("schema_version", SCHEMA_VERSION..SCHEMA_VERSION)
            val vocabSize = manifest.integer("model.vocab_size")
            val numSegments = manifest.array("exits").size + 1
            val slots = manifest.integer("program.slots")
            val maxWidth = manifest.integer("program.max_width", 1..slots)
            val drafts = manifest.find("program.draft_vocabulary") !is JsonNull
            val methods = manifest.array("program.methods").map { Manifest(it).text("name") }.toSet()
            val expected = expectedMethods(numSegments, drafts)
            if (methods != expected) {
                throw BundleException("program.methods are ${methods.sorted()}; expected ${expected.sorted()}")
            }
            return Bundle(
                program = listedFile(folder, manifest, "program.file"),
                tokenizer = listedFile(folder, manifest, "tokenizer"),
                hiddenSize = manifest.integer("model.hidden_size"),
                vocabSize = vocabSize,
                numSegments = numSegments,
                capacity = minOf(slots, manifest.integer("model.context_length")),
                slots = slots,
                maxWidth = maxWidth,
                referenceWidth = manifest.integer("program.reference_width", 1..maxWidth),
                eosTokenIds = manifest.integers("model.eos_token_ids", 0 until vocabSize).toSet(),
                draftVocabulary =
                    if (drafts) readVocabulary(listedFile(folder, manifest, "program.draft_vocabulary"), vocabSize)
                    else IntArray(0),
                methods = methods,
            )
        }

        private fun expectedMethods(numSegments: Int, drafts: Boolean): Set<String> {
            val segments = (0 until numSegments).map { "segment_$it" }
            return setOf("embed", "head", "compact") + segments + if (drafts) setOf("draft_head") else emptySet()
        }

        /** A file of the bundle: inside the folder, listed in the manifest, of the size and hash listed there. */
        private fun listedFile(folder: File, manifest: Manifest, key: String): File {
            val name = manifest.text(key)
            val parts = name.split('/')
            if (name.isEmpty() || name.startsWith('/') || '\\' in name || ".." in parts) {
                throw BundleException("$key \"$name\" is not a path inside the bundle")
            }
            val entry =
                manifest.array("files").map(::Manifest).find { it.text("path") == name }
                    ?: throw BundleException("$name is not listed under files")
            val file = File(folder, name)
            if (!file.isFile) throw BundleException("$name is missing")
            if (file.length() != entry.long("size")) {
                throw BundleException("$name has ${file.length()} bytes; the manifest says ${entry.long("size")}")
            }
            if (sha256(file) != entry.text("sha256")) {
                throw BundleException("$name is damaged: its SHA-256 is not the one listed")
            }
            return file
        }

        private fun sha256(file: File): String {
            val digest = MessageDigest.getInstance("SHA-256")
            file.inputStream().use { stream ->
                val piece = ByteArray(1 shl 20)
                generateSequence { stream.read(piece).takeIf { it > 0 } }.forEach { digest.update(piece, 0, it) }
            }
            return digest.digest().joinToString("") { "%02x".format(it) }
        }

        private fun readVocabulary(file: File, vocabSize: Int): IntArray {
            val bytes = file.readBytes()
            if (bytes.isEmpty() || bytes.size % Int.SIZE_BYTES != 0) {
                throw BundleException("${file.name}: ${bytes.size} bytes are no list of int32")
            }
            val tokens = IntArray(bytes.size / Int.SIZE_BYTES)
            ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asIntBuffer().get(tokens)
            val alien = tokens.find { it !in 0 until vocabSize }
            if (alien != null) throw BundleException("${file.name}: token $alien is not in the vocabulary")
            return tokens
        }
    }
}

/** Values of a JSON object by dotted path; everything throws [BundleException] naming the path. */
internal class Manifest(private val root: JsonElement) {
    fun find(path: String): JsonElement =
        path.split('.').fold(root) { element, key ->
            (element as? JsonObject)?.get(key) ?: throw BundleException("$path is missing")
        }

    fun text(path: String): String =
        (find(path) as? JsonPrimitive)?.takeIf { it.isString }?.content
            ?: throw BundleException("$path is not a string")

    fun array(path: String): JsonArray =
        find(path) as? JsonArray ?: throw BundleException("$path is not an array")

    fun long(path: String): Long = long(find(path), path)

    fun integer(path: String, range: IntRange = 1..Int.MAX_VALUE): Int = integer(find(path), path, range)

    fun integers(path: String, range: IntRange): List<Int> = array(path).map { integer(it, path, range) }

    private fun long(element: JsonElement, path: String): Long =
        (element as? JsonPrimitive)?.takeIf { !it.isString }?.longOrNull
            ?: throw BundleException("$path is not an integer")

    private fun integer(element: JsonElement, path: String, range: IntRange): Int {
        val found = long(element, path)
        if (found < range.first || found > range.last) {
            throw BundleException("$path is $found; expected ${range.first} to ${range.last}")
        }
        return found.toInt()
    }
}
