#include "generate.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "error.h"

namespace runner {

namespace {

// One text being continued. `pending_` is chosen already but has not been run: it is the first row of the next round.
class Decoder {
 public:
  Decoder(Program& program, const Limits& limits) : program_(program), limits_(limits) {}

  // Runs the prompt in batches; the last row chooses the first token.
  void prefill(const std::vector<int64_t>& prompt) {
    Hidden last;
    for (size_t from = 0; from < prompt.size();) {
      const size_t count = std::min(prompt.size() - from, static_cast<size_t>(program_.bundle().max_width));
      const auto first = prompt.begin() + static_cast<ptrdiff_t>(from);
      last = run(0, program_.embed({first, first + static_cast<ptrdiff_t>(count)}), static_cast<int64_t>(from));
      from += count;
    }
    length_ = static_cast<int64_t>(prompt.size());
    const Hidden row(last.end() - static_cast<ptrdiff_t>(program_.bundle().hidden_size), last.end());
    pending_ = program_.best_tokens(row)[0];
    emit(pending_);
  }

  // LayerSkip (Elhoushi et al. 2024, section 4.3), greedy: the first segment drafts token by token, the rest verifies all
  // rows in one batch that goes on from the drafting rows' hidden states. A draft is accepted while it equals the token
  // the last layer chose after the row before it; that layer's next choice is the round's own token.
  void round() {
    Hidden rows;
    const std::vector<int64_t> drafts = draft(rows);
    const std::vector<int64_t> chosen = program_.best_tokens(run(1, std::move(rows), length_));
    size_t kept = 0;
    while (kept < drafts.size() && drafts[kept] == chosen[kept]) ++kept;
    const int64_t before = static_cast<int64_t>(out_.tokens.size());
    for (size_t row = 0; row <= kept && !done(); ++row) emit(chosen[row]);
    // Accepted rows stand where they belong already; rejected ones lie behind the context and will be overwritten.
    length_ += static_cast<int64_t>(kept) + 1;
    pending_ = chosen[kept];
    out_.rounds += 1;
    out_.drafted += static_cast<int64_t>(drafts.size());
    out_.accepted += std::min(static_cast<int64_t>(out_.tokens.size()) - before, static_cast<int64_t>(kept));
  }

  bool done() const { return ended_ || static_cast<int64_t>(out_.tokens.size()) >= limits_.max_new_tokens; }

  Generation& out() { return out_; }

 private:
  // The pending token and the drafts after it, all run through the first segment: their hidden states go to `rows`.
  std::vector<int64_t> draft(Hidden& rows) {
    const int64_t left = limits_.max_new_tokens - static_cast<int64_t>(out_.tokens.size());
    const int64_t wanted = std::min(limits_.draft_length, left - 1);  // a round gives one more token than its drafts
    std::vector<int64_t> drafts;
    for (int64_t token = pending_;;) {
      const Hidden row = program_.segment(0, program_.embed({token}), length_ + static_cast<int64_t>(drafts.size()));
      rows.insert(rows.end(), row.begin(), row.end());
      if (static_cast<int64_t>(drafts.size()) >= wanted) return drafts;
      token = program_.best_draft_tokens(row)[0];
      drafts.push_back(token);
    }
  }

  // Rows through the segments from `first` on.
  Hidden run(int64_t first, Hidden rows, int64_t start) {
    for (int64_t k = first; k < program_.bundle().num_segments; ++k) rows = program_.segment(k, rows, start);
    return rows;
  }

  void emit(int64_t token) {
    const auto& ends = program_.bundle().eos_token_ids;
    out_.tokens.push_back(token);
    ended_ = std::find(ends.begin(), ends.end(), token) != ends.end();
  }

  Program& program_;
  const Limits limits_;
  Generation out_;
  int64_t length_ = 0;  // rows that are context
  int64_t pending_ = 0;
  bool ended_ = false;
};

void check(const Bundle& bundle, const std::vector<int64_t>& prompt, const Limits& limits) {
  if (prompt.empty()) throw UsageError("--tokens: an empty prompt");
  for (const int64_t token : prompt) {
    if (token < 0 || token >= bundle.vocab_size) {
      throw UsageError("--tokens: " + std::to_string(token) + " is not in the vocabulary of " +
                       std::to_string(bundle.vocab_size));
    }
  }
  if (limits.draft_length > 0 && bundle.draft_vocabulary.empty()) {
    throw UsageError("--strategy layerskip: the bundle has no inner exit to draft at");
  }
  if (limits.draft_length >= bundle.max_width) {
    throw UsageError("--draft-length " + std::to_string(limits.draft_length) + ": the program takes " +
                     std::to_string(bundle.max_width) + " rows, so at most " + std::to_string(bundle.max_width - 1));
  }
  // The last token is never run. Padding needs slots behind the last row.
  const int64_t rows = static_cast<int64_t>(prompt.size()) + limits.max_new_tokens - 1;
  const int64_t most = std::min(bundle.capacity, bundle.slots - (bundle.reference_width - 1));
  if (rows > most) {
    throw UsageError("the prompt's " + std::to_string(prompt.size()) + " tokens and " +
                     std::to_string(limits.max_new_tokens) + " new ones do not fit the context of " +
                     std::to_string(most));
  }
}

}  // namespace

Generation generate(Program& program, const std::vector<int64_t>& prompt, const Limits& limits) {
  using Clock = std::chrono::steady_clock;
  check(program.bundle(), prompt, limits);
  Decoder decoder(program, limits);
  const auto started = Clock::now();
  decoder.prefill(prompt);
  const auto prefilled = Clock::now();
  while (!decoder.done()) decoder.round();
  decoder.out().mask_slots = program.mask_slots();
  decoder.out().prefill_seconds = std::chrono::duration<double>(prefilled - started).count();
  decoder.out().decode_seconds = std::chrono::duration<double>(Clock::now() - prefilled).count();
  return std::move(decoder.out());
}

}  // namespace runner
