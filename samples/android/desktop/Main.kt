package skipstone.sample.desktop

import java.io.File
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.buildJsonArray
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonPrimitive
import kotlinx.serialization.json.put
import kotlinx.serialization.json.putJsonArray
import skipstone.sample.Bundle
import skipstone.sample.BundleException
import skipstone.sample.Limits
import skipstone.sample.Program
import skipstone.sample.Tokenizer
import skipstone.sample.generate

/**
 * The app without its screen: `Main REQUESTS RESULTS`. REQUESTS is a JSON array of {"bundle", "prompt",
 * "max_new_tokens", "draft_length"}; RESULTS becomes an array of what came of each.
 */
fun main(arguments: Array<String>) {
    val (requests, results) = arguments.map(::File)
    val made = buildJsonArray {
        for (request in Json.parseToJsonElement(requests.readText()).jsonArray) add(answer(request as JsonObject))
    }
    results.writeText(made.toString())
}

private fun answer(request: JsonObject): JsonObject =
    try {
        continued(request)
    } catch (error: BundleException) {
        buildJsonObject { put("error", error.message) }
    }

private fun continued(request: JsonObject): JsonObject {
    fun number(key: String) = request.getValue(key).jsonPrimitive.int
    val bundle = Bundle.open(File(request.getValue("bundle").jsonPrimitive.content))
    val tokenizer = Tokenizer.read(bundle.tokenizer)
    val prompt = tokenizer.encode(request.getValue("prompt").jsonPrimitive.content)
    return Program(bundle).use { program ->
        var seen = 0
        val limits = Limits(number("max_new_tokens"), number("draft_length"))
        val made = generate(program, prompt, limits) { seen = it.size }
        buildJsonObject {
            putJsonArray("prompt_tokens") { prompt.forEach { add(JsonPrimitive(it)) } }
            putJsonArray("tokens") { made.tokens.forEach { add(JsonPrimitive(it)) } }
            put("text", tokenizer.decode(made.tokens))
            put("seen", seen)
            put("rounds", made.rounds)
            put("drafted", made.drafted)
            put("accepted", made.accepted)
            put("tested", bundle.tested)
        }
    }
}
