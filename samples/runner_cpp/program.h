// The bundle's .pte: its methods as plain functions over rows. Only what a chain of drafts needs; trees and `compact` are
// described in docs/executorch.md.
#pragma once

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"

namespace runner {

// Rows' hidden states, float32 [n, hidden_size].
using Hidden = std::vector<float>;

struct ProgramOptions {
  // All methods see one K/V buffer, as `compact` needs; else each method keeps its own, which is enough for chains, since no
  // layer belongs to two segments.
  bool shared_state = true;
  // Rows go through the kernel that trees take, each with a mask of what it sees.
  bool masked = false;
};

class Program {
 public:
  // Loads every method. Throws Error where the file is damaged, does not fit its manifest, or was lowered for a delegate
  // that this build does not have.
  Program(const Bundle& bundle, const ProgramOptions& options);

  // Token ids → hidden states before the first layer; 1 to max_width rows.
  Hidden embed(const std::vector<int64_t>& tokens);

  // Run rows through a segment's layers. The rows stand at positions start, start + 1, … behind the rows run before;
  // their K and V are kept, over those of rows that stood there.
  Hidden segment(int64_t index, const Hidden& hidden, int64_t start);

  // Most likely token after each row: by the head, or by the draft head, which knows the draft vocabulary alone.
  std::vector<int64_t> best_tokens(const Hidden& hidden);
  std::vector<int64_t> best_draft_tokens(const Hidden& hidden);

  const Bundle& bundle() const { return bundle_; }

  // Most slots that a mask handed in so far has shown. What a masked row costs grows with it.
  int64_t mask_slots() const { return mask_slots_; }

 private:
  using TensorPtr = executorch::extension::TensorPtr;

  executorch::aten::Tensor call(const std::string& method, const std::vector<TensorPtr>& inputs);
  std::vector<int64_t> best_rows(const std::string& head, const Hidden& hidden);
  Hidden padded(const Hidden& hidden) const;
  int64_t rows_of(const Hidden& hidden) const;
  void check_target() const;
  void load_methods();

  Bundle bundle_;
  bool masked_;
  executorch::extension::Module module_;
  int64_t mask_slots_ = 0;
};

}  // namespace runner
