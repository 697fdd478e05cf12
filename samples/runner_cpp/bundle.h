// A bundle's folder: manifest.json and the files it names, checked before anything is run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace runner {

struct Bundle {
  std::filesystem::path program;         // the .pte
  int64_t hidden_size = 0;
  int64_t vocab_size = 0;
  int64_t num_segments = 0;
  int64_t capacity = 0;                  // positions: the program's slots, or the model's context where that is shorter
  int64_t slots = 0;                     // of K/V in the program
  int64_t max_width = 0;                 // most rows of a call
  int64_t reference_width = 0;           // fewest rows of a call; narrower batches are padded
  std::vector<int64_t> eos_token_ids;
  std::vector<int64_t> draft_vocabulary; // token id of every row of the draft head; empty without one
  std::vector<std::string> methods;
  std::string target;                    // delegate that the program was lowered for, as the manifest names it
  bool tested = false;                   // it went through the exporter's self-test
};

// Reads and checks a bundle of format "executorch", schema version 1, program interface 2. Throws Error.
Bundle open_bundle(const std::filesystem::path& folder);

}  // namespace runner
