package skipstone.sample

import java.io.File
import java.io.IOException
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
 * @property target delegate that the program was lowered for, as the manifest names it.
 * @property tested the program went through the exporter's self-test; else it was only compiled where it was exported.
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
    val target: String,
    val tested: Boolean,
) {
    companion object {
        private const val SCHEMA_VERSION = 1

        /** What the methods mean: docs/executorch.md. */
        private const val PROGRAM_INTERFACE = 2

        /** Few enough that a mask over all of them fits a phone's memory. */
        private const val MOST_SLOTS = 1 shl 16

        /** Reads and checks a bundle of format "executorch", schema version 1, interface 2. Throws [BundleException]. */
        fun open(folder: File): Bundle {
            val path = File(folder, "manifest.json")
            if (!path.isFile) throw BundleException("$path: no such file")
            try {
                return read(folder, Manifest(Json.parseToJsonElement(path.readText())))
            } catch (error: IOException) {
                throw BundleException("$path: cannot be read: ${error.message}")
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
            checkInterface(manifest)
            val vocabSize = manifest.integer("model.vocab_size")
            val numSegments = manifest.array("exits").size + 1
            val slots = manifest.integer("program.slots", 1..MOST_SLOTS)
            val maxWidth = manifest.integer("program.max_width", 1..slots)
            val drafts = !manifest.isNull("program.draft_vocabulary")
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
                target = manifest.text("program.target"),
                tested = isTested(manifest),
            )
        }

        /** Manifests from before the number was introduced have none: they are of interface 1. */
        private fun checkInterface(manifest: Manifest) {
            val found = if (manifest.isNull("program.interface")) 1 else manifest.integer("program.interface")
            if (found == PROGRAM_INTERFACE) return
            val next = if (found < PROGRAM_INTERFACE) "export the bundle again" else "update the app"
            throw BundleException("program.interface is $found; this app calls interface $PROGRAM_INTERFACE; $next")
        }

        private fun isTested(manifest: Manifest): Boolean {
            val status = if (manifest.isNull("program.status")) "runs" else manifest.text("program.status")
            if (status != "runs" && status != "compiled") {
                throw BundleException("program.status is \"$status\"; expected \"runs\" or \"compiled\"")
            }
            return status == "runs"
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
            if (!file.isFile) throw BundleException("$name is missing; copy or export the bundle again")
            if (file.length() != entry.long("size")) {
                throw BundleException(
                    "$name has ${file.length()} bytes; the manifest says ${entry.long("size")}; copy or export the bundle again"
                )
            }
            if (sha256(file) != entry.text("sha256")) {
                throw BundleException("$name is damaged: its SHA-256 is not the one listed; copy or export the bundle again")
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
    fun find(path: String): JsonElement = findOrNull(path) ?: throw BundleException("$path is missing")

    /** Null, or nothing at all, stands at the path. */
    fun isNull(path: String): Boolean = findOrNull(path).let { it == null || it is JsonNull }

    fun text(path: String): String =
        (find(path) as? JsonPrimitive)?.takeIf { it.isString }?.content
            ?: throw BundleException("$path is not a string")

    fun array(path: String): JsonArray =
        find(path) as? JsonArray ?: throw BundleException("$path is not an array")

    fun members(path: String): JsonObject =
        find(path) as? JsonObject ?: throw BundleException("$path is not an object")

    /** The integers that stand under an object's keys. */
    fun numbers(path: String): Map<String, Int> =
        members(path).mapValues { (key, value) -> integer(value, "$path.$key", 0..Int.MAX_VALUE) }

    fun long(path: String): Long = long(find(path), path)

    fun integer(path: String, range: IntRange = 1..Int.MAX_VALUE): Int = integer(find(path), path, range)

    fun integers(path: String, range: IntRange): List<Int> = array(path).map { integer(it, path, range) }

    private fun findOrNull(path: String): JsonElement? =
        path.split('.').fold(root as JsonElement?) { element, key -> (element as? JsonObject)?.get(key) }

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
