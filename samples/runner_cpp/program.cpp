#include "program.h"

#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <numeric>

#include "error.h"

namespace runner {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;

// Inputs of a segment's method, in order.
enum SegmentInput : size_t { kHidden, kPositions, kSlots, kStart, kMask, kTree, kSegmentInputs };

// ExecuTorch writes the reason of a failure to its log; the last one becomes the end of our own line.
std::string& last_log_line() {
  static std::string line;
  return line;
}

void keep_log_line(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
                   size_t length) {
  if (level == kError || level == kFatal) last_log_line().assign(message, length);
}

void silence_log() {
  using executorch::runtime::PalImpl;
  executorch::runtime::register_pal(PalImpl::create(&keep_log_line, __FILE__));
}

template <typename Outcome>
void require(const Outcome& error, const std::string& what) {
  if (error == executorch::runtime::Error::Ok) return;
  const std::string reason = last_log_line().empty() ? "error " + std::to_string(static_cast<int>(error)) : last_log_line();
  throw Error(what + ": " + reason);
}

std::vector<int64_t> counting(int64_t first, int64_t count) {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

TensorPtr as_tensor(std::vector<int64_t>& values) {
  return from_blob(values.data(), {1, static_cast<SizesType>(values.size())}, ScalarType::Long);
}

}  // namespace

Program::Program(const Bundle& bundle, bool shared_state)
    : bundle_(bundle),
      module_((silence_log(), bundle.program.string()), Module::LoadMode::Mmap, nullptr, nullptr, nullptr, shared_state),
      mask_(static_cast<size_t>(bundle.max_width * bundle.slots)) {
  load_methods();
  check_shapes();
}

void Program::load_methods() {
  using Verification = executorch::runtime::Program::Verification;
  const std::string file = bundle_.program.string();
  require(module_.load(Verification::InternalConsistency), file + ": cannot be loaded");
  const auto names = module_.method_names();
  require(names.error(), file + ": names no methods");
  for (const auto& name : bundle_.methods) {
    if (!names->count(name)) throw Error(file + ": has no method " + name + ", which the manifest names");
  }
  for (const auto& name : *names) {
    const auto& known = bundle_.methods;
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw Error(file + ": has a method " + name + ", which the manifest does not name");
    }
  }
  for (const auto& name : bundle_.methods) require(module_.load_method(name), file + ": method " + name);
}

// What the calls below take for granted: shapes as in the manifest.
void Program::check_shapes() {
  const std::string file = bundle_.program.string();
  const auto expect = [&](const std::string& what, int64_t found, int64_t expected) {
    if (found == expected) return;
    throw Error(file + ": " + what + " is " + std::to_string(found) + "; expected " + std::to_string(expected));
  };
  const auto size = [&](const auto& tensor, const std::string& what, size_t dims, size_t axis) {
    require(tensor.error(), file + ": " + what);
    expect("the number of dimensions of " + what, static_cast<int64_t>(tensor->sizes().size()),
           static_cast<int64_t>(dims));
    return static_cast<int64_t>(tensor->sizes()[axis]);
  };
  for (int64_t k = 0; k < bundle_.num_segments; ++k) {
    const std::string name = "segment_" + std::to_string(k);
    const auto meta = module_.method_meta(name);
    require(meta.error(), file + ": " + name);
    expect("the number of inputs of " + name, static_cast<int64_t>(meta->num_inputs()), kSegmentInputs);
    expect("the hidden size of " + name, size(meta->input_tensor_meta(kHidden), name, 3, 2), bundle_.hidden_size);
    expect("the number of slots of " + name, size(meta->input_tensor_meta(kMask), name, 2, 1), bundle_.slots);
    expect("the greatest width of " + name, size(meta->input_tensor_meta(kMask), name, 2, 0), bundle_.max_width);
    size(meta->input_tensor_meta(kTree), name, 1, 0);
    tree_type_ = meta->input_tensor_meta(kTree)->scalar_type();
  }
  const auto expect_rows = [&](const std::string& head, int64_t rows) {
    const auto meta = module_.method_meta(head);
    require(meta.error(), file + ": " + head);
    expect("the vocabulary of " + head, size(meta->output_tensor_meta(0), head, 3, 2), rows);
  };
  expect_rows("head", bundle_.vocab_size);
  const auto drafts = static_cast<int64_t>(bundle_.draft_vocabulary.size());
  if (drafts > 0) expect_rows("draft_head", drafts);
}

executorch::aten::Tensor Program::call(const std::string& method, const std::vector<TensorPtr>& inputs) {
  std::vector<executorch::runtime::EValue> values(inputs.begin(), inputs.end());
  last_log_line().clear();
  auto outputs = module_.execute(method, values);
  require(outputs.error(), method);
  return outputs->at(0).toTensor();
}

int64_t Program::rows_of(const Hidden& hidden) const {
  return static_cast<int64_t>(hidden.size()) / bundle_.hidden_size;
}

// The last row repeated up to the reference width. Padding stands behind every row of the batch, so none sees it, and its
// K and V are overwritten by the rows that come to stand there.
Hidden Program::padded(const Hidden& hidden) const {
  const auto width = static_cast<size_t>(std::max(rows_of(hidden), bundle_.reference_width));
  const auto size = static_cast<size_t>(bundle_.hidden_size);
  Hidden wide = hidden;
  while (wide.size() < width * size) wide.insert(wide.end(), hidden.end() - static_cast<ptrdiff_t>(size), hidden.end());
  return wide;
}

Hidden Program::embed(const std::vector<int64_t>& tokens) {
  std::vector<int64_t> ids = tokens;
  const auto out = call("embed", {as_tensor(ids)});
  const auto* first = out.const_data_ptr<float>();
  return {first, first + out.numel()};
}

Hidden Program::segment(int64_t index, const Hidden& hidden, int64_t start) {
  Hidden wide = padded(hidden);
  const auto width = static_cast<SizesType>(rows_of(wide));
  std::vector<int64_t> places = counting(start, width);
  int64_t first = start, chain = 0;  // zero bytes mean "no tree" in every type
  const auto out = call("segment_" + std::to_string(index),
                        {from_blob(wide.data(), {1, width, static_cast<SizesType>(bundle_.hidden_size)}),
                         as_tensor(places), as_tensor(places), from_blob(&first, {1}, ScalarType::Long),
                         from_blob(mask_.data(), {width, static_cast<SizesType>(bundle_.slots)}),
                         from_blob(&chain, {1}, tree_type_)});
  const auto* data = out.const_data_ptr<float>();
  return {data, data + hidden.size()};
}

std::vector<int64_t> Program::best_rows(const std::string& head, const Hidden& hidden) {
  Hidden wide = padded(hidden);
  const auto width = static_cast<SizesType>(rows_of(wide));
  const auto out = call(head, {from_blob(wide.data(), {1, width, static_cast<SizesType>(bundle_.hidden_size)})});
  const auto* logits = out.const_data_ptr<float>();
  const auto columns = static_cast<ptrdiff_t>(out.size(2));
  std::vector<int64_t> best;
  for (int64_t row = 0; row < rows_of(hidden); ++row, logits += columns) {
    best.push_back(std::max_element(logits, logits + columns) - logits);
  }
  return best;
}

std::vector<int64_t> Program::best_tokens(const Hidden& hidden) { return best_rows("head", hidden); }

std::vector<int64_t> Program::best_draft_tokens(const Hidden& hidden) {
  std::vector<int64_t> tokens = best_rows("draft_head", hidden);
  for (auto& token : tokens) token = bundle_.draft_vocabulary.at(static_cast<size_t>(token));
  return tokens;
}

}  // namespace runner
