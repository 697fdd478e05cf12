package skipstone.sample

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonPrimitive

/**
 * Byte-level BPE as GPT-2 has it (Radford et al. 2019, section 2.2), read from a tokenizer.json.
 *
 * That is one kind of tokenizer among those that file can describe: no normaliser, no added tokens in the text, the ByteLevel
 * pre-tokenizer with its own pattern. Others are refused, and an app takes a full tokenizer library for them.
 */
class Tokenizer private constructor(private val ids: Map<String, Int>, private val ranks: Map<Pair<String, String>, Int>) {
    private val pieces = ids.entries.associate { (piece, id) -> id to piece }

    fun encode(text: String): IntArray =
        WORD.findAll(text).flatMap { word ->
            merge(word.value.toByteArray().map { LETTERS[it.toInt() and 0xFF].toString() }).map(::id)
        }.toList().toIntArray()

    /** Bytes that are not UTF-8, at a text's open end say, become U+FFFD. */
    fun decode(tokens: List<Int>): String {
        val bytes = ByteArrayOutputStream()
        for (letter in tokens.joinToString("") { pieces[it].orEmpty() }) BYTES[letter]?.let(bytes::write)
        return bytes.toString(Charsets.UTF_8.name())
    }

    private fun id(piece: String): Int = ids[piece] ?: throw BundleException("the tokenizer has no piece \"$piece\"")

    /** Joins the pair of lowest rank, wherever it stands, until no pair has one. */
    private fun merge(letters: List<String>): List<String> {
        var parts = letters
        while (true) {
            val best = parts.zipWithNext().filter(ranks::containsKey).minByOrNull(ranks::getValue) ?: return parts
            val joined = ArrayList<String>(parts.size)
            var place = 0
            while (place < parts.size) {
                val fits = place + 1 < parts.size && parts[place] == best.first && parts[place + 1] == best.second
                joined.add(if (fits) best.first + best.second else parts[place])
                place += if (fits) 2 else 1
            }
            parts = joined
        }
    }

    companion object {
        /** Unicode's white space; Java's own `\s` is ASCII alone, Android's is not. */
        private const val SPACE = """\s\u0085\p{Z}"""
        private val WORD =
            Regex("""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^$SPACE\p{L}\p{N}]+|[$SPACE]+(?![^$SPACE])|[$SPACE]+""")

        /** Every byte as a printable character: itself where it is one, else from U+0100 on. */
        private val LETTERS: List<Char> = run {
            var next = 0x100
            (0..0xFF).map { byte ->
                val printable = byte in 0x21..0x7E || byte in 0xA1..0xAC || byte in 0xAE..0xFF
                if (printable) byte.toChar() else (next++).toChar()
            }
        }
        private val BYTES: Map<Char, Int> = LETTERS.withIndex().associate { (byte, letter) -> letter to byte }

        /** Reads a tokenizer.json. Throws [BundleException] where it is damaged or of another kind. */
        fun read(file: File): Tokenizer =
            try {
                read(Manifest(Json.parseToJsonElement(file.readText())))
            } catch (error: IOException) {
                throw BundleException("$file: cannot be read: ${error.message}")
            } catch (error: SerializationException) {
                throw BundleException("$file: not JSON: ${error.message?.lines()?.first()}")
            } catch (error: BundleException) {
                throw BundleException("$file: ${error.message}")
            }

        private fun read(root: Manifest): Tokenizer {
            refuseOtherKinds(root)
            val merges = root.array("model.merges").withIndex().associate { (rank, pair) -> pairOf(pair, rank) to rank }
            return Tokenizer(root.numbers("model.vocab"), merges)
        }

        /** Whatever would change the token ids and is not read here. */
        private fun refuseOtherKinds(root: Manifest) {
            fun isTrue(path: String) = !root.isNull(path) && root.find(path) == JsonPrimitive(true)
            fun isText(path: String) = !root.isNull(path) && root.find(path) != JsonPrimitive("")
            val model = root.text("model.type")
            val split = root.text("pre_tokenizer.type")
            val other =
                when {
                    model != "BPE" || split != "ByteLevel" -> "$model after $split"
                    !isTrue("pre_tokenizer.use_regex") -> "pre_tokenizer.use_regex"
                    isTrue("pre_tokenizer.add_prefix_space") -> "pre_tokenizer.add_prefix_space"
                    !root.isNull("normalizer") -> "normalizer"
                    !root.isNull("post_processor") && root.text("post_processor.type") != "ByteLevel" -> "post_processor"
                    isTrue("model.ignore_merges") -> "model.ignore_merges"
                    isText("model.continuing_subword_prefix") -> "model.continuing_subword_prefix"
                    isText("model.end_of_word_suffix") -> "model.end_of_word_suffix"
                    else -> return
                }
            throw BundleException("$other: not the plain byte-level BPE that this sample reads; take a tokenizer library")
        }

        /** A merge stands as ["a", "b"], in older files as "a b". */
        private fun pairOf(merge: JsonElement, rank: Int): Pair<String, String> {
            val parts = if (merge is JsonArray) merge.map(::textOf) else textOf(merge)?.split(' ').orEmpty()
            val (left, right) = parts.takeIf { it.size == 2 } ?: listOf(null, null)
            if (left == null || right == null) throw BundleException("model.merges: entry $rank is no pair of texts")
            return left to right
        }

        private fun textOf(element: JsonElement): String? = (element as? JsonPrimitive)?.takeIf { it.isString }?.content
    }
}
