package skipstone.sample

import android.app.Activity
import android.os.Bundle as State
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.widget.Button
import android.widget.CheckBox
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import java.util.concurrent.CancellationException
import java.util.concurrent.Executors

/** One screen: a prompt, whether to draft, the text as it grows, and what came of the drafts. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor() // a Program is not for several threads at once
    private lateinit var prompt: EditText
    private lateinit var drafts: CheckBox
    private lateinit var start: Button
    private lateinit var output: TextView
    private lateinit var figures: TextView

    /** The worker's alone; opened at the first run, because loading a program takes seconds. */
    private var opened: Pair<Program, Tokenizer>? = null

    /** A run that is under way ends with its round. */
    @Volatile private var gone = false

    override fun onCreate(savedInstanceState: State?) {
        super.onCreate(savedInstanceState)
        prompt = EditText(this).apply { setText("def quicksort(") }
        drafts = CheckBox(this).apply { text = "LayerSkip"; isChecked = true }
        start = Button(this).apply { text = "Continue"; setOnClickListener { begin() } }
        output = TextView(this).apply { typeface = android.graphics.Typeface.MONOSPACE; setTextIsSelectable(true) }
        figures = TextView(this)
        val column = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL; fitsSystemWindows = true }
        listOf<View>(prompt, drafts, start, figures, output).forEach { column.addView(it, MATCH_PARENT, -2) }
        setContentView(ScrollView(this).apply { addView(column) })
    }

    override fun onDestroy() {
        gone = true
        worker.execute { opened?.first?.close() }
        worker.shutdown() // after what was handed in
        super.onDestroy()
    }

    private fun begin() {
        val text = prompt.text.toString()
        val limits = Limits(MAX_NEW_TOKENS, if (drafts.isChecked) DRAFT_LENGTH else 0)
        start.isEnabled = false
        worker.execute {
            val told = runCatching { continueText(text, limits) }.getOrElse { it.message ?: it.toString() }
            runOnUiThread {
                figures.text = told
                start.isEnabled = true
            }
        }
    }

    /** Runs in the worker; returns the run's figures. */
    private fun continueText(text: String, limits: Limits): String {
        val (program, tokenizer) = opened ?: open().also { opened = it }
        val made =
            generate(program, tokenizer.encode(text), limits) { tokens ->
                if (gone) throw CancellationException("the screen was closed")
                val grown = text + tokenizer.decode(tokens)
                runOnUiThread { output.text = grown }
            }
        val speed = if (made.tokens.size > 1) (made.tokens.size - 1) / made.decodeSeconds else 0.0
        val figures =
            "%.1f tokens/s; %d of %d drafts accepted in %d rounds".format(speed, made.accepted, made.drafted, made.rounds)
        return if (program.bundle.tested) figures else "$figures. Compiled without a self-test: compare the text with the model's"
    }

    /** The program last: whatever fails before it leaves nothing to close. */
    private fun open(): Pair<Program, Tokenizer> {
        val bundle = Bundle.open(File(getExternalFilesDir(null), "bundle"))
        val tokenizer = Tokenizer.read(bundle.tokenizer)
        return Program(bundle) to tokenizer
    }

    private companion object {
        const val MAX_NEW_TOKENS = 64
        const val DRAFT_LENGTH = 4
    }
}
