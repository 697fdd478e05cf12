// Greedy decoding: plain, or drafted by the first segment and verified by the rest.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace runner {

struct Limits {
  int64_t max_new_tokens = 0;
  int64_t draft_length = 0;  // drafts per round; 0 is plain decoding
};

struct Generation {
  std::vector<int64_t> tokens;  // the end token included, where there was one
  int64_t rounds = 0;
  int64_t drafted = 0;
  int64_t accepted = 0;         // drafts that became tokens
  int64_t mask_slots = 0;       // most slots that a mask showed
  double prefill_seconds = 0;   // up to the first token
  double decode_seconds = 0;    // all the others
};

// Throws UsageError where the prompt is empty or names no token, or the text would not fit the context.
Generation generate(Program& program, const std::vector<int64_t>& prompt, const Limits& limits);

}  // namespace runner
