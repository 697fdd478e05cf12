#include "signature.h"

#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace runner {

namespace {

using executorch::aten::ScalarType;
using executorch::runtime::MethodMeta;
using executorch::runtime::Result;
using executorch::runtime::TensorInfo;

// A tensor's name in docs/executorch.md, its type and its largest shape.
struct Array {
  std::string name;
  ScalarType type;
  std::vector<int64_t> sizes;
};

struct Signature {
  std::string method;
  std::vector<Array> inputs;
  std::vector<Array> outputs;
};

std::string described(ScalarType type, const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  const std::string name = type == ScalarType::Float  ? "float32"
                           : type == ScalarType::Long ? "int64"
                                                      : "type " + std::to_string(static_cast<int>(type));
  return name + " [" + text + "]";
}

std::vector<Signature> expected_signatures(const Bundle& bundle) {
  const int64_t width = bundle.max_width;
  const Array hidden{"hidden", ScalarType::Float, {1, width, bundle.hidden_size}};
  const auto rows = [&](const char* name) { return Array{name, ScalarType::Long, {1, width}}; };
  const auto one = [](const char* name) { return Array{name, ScalarType::Long, {1}}; };
  const auto logits = [&](int64_t tokens) { return Array{"logits", ScalarType::Float, {1, width, tokens}}; };
  const Array mask{"mask", ScalarType::Float, {width, bundle.slots}};
  const Array sources{"sources", ScalarType::Long, {width}};
  std::vector<Signature> expected = {{"embed", {rows("tokens")}, {hidden}}};
  for (int64_t k = 0; k < bundle.num_segments; ++k) {
    expected.push_back({"segment_" + std::to_string(k),
                        {hidden, rows("positions"), rows("slots"), one("start"), mask, one("tree")},
                        {hidden}});
  }
  expected.push_back({"head", {hidden}, {logits(bundle.vocab_size)}});
  if (!bundle.draft_vocabulary.empty()) {
    expected.push_back({"draft_head", {hidden}, {logits(static_cast<int64_t>(bundle.draft_vocabulary.size()))}});
  }
  expected.push_back({"compact", {sources, rows("targets")}, {sources}});
  return expected;
}

void check_array(const std::string& place, const Result<TensorInfo>& found, const Array& expected) {
  if (!found.ok()) throw Error(place + " is no tensor");
  const std::vector<int64_t> sizes(found->sizes().begin(), found->sizes().end());
  if (found->scalar_type() == expected.type && sizes == expected.sizes) return;
  throw Error(place + " is " + described(found->scalar_type(), sizes) + "; by the manifest it is " +
              described(expected.type, expected.sizes));
}

void check_signature(const MethodMeta& found, const Signature& expected) {
  const auto check_number = [&](const char* what, size_t number, size_t wanted) {
    if (number == wanted) return;
    throw Error(expected.method + " has " + std::to_string(number) + " " + what + "; expected " + std::to_string(wanted));
  };
  check_number("inputs", found.num_inputs(), expected.inputs.size());
  check_number("outputs", found.num_outputs(), expected.outputs.size());
  for (size_t index = 0; index < expected.inputs.size(); ++index) {
    const Array& input = expected.inputs[index];
    check_array("input " + input.name + " of " + expected.method, found.input_tensor_meta(index), input);
  }
  for (size_t index = 0; index < expected.outputs.size(); ++index) {
    const Array& output = expected.outputs[index];
    check_array("output " + output.name + " of " + expected.method, found.output_tensor_meta(index), output);
  }
}

}  // namespace

void check_signatures(executorch::extension::Module& module, const Bundle& bundle) {
  const std::string file = bundle.program.string();
  for (const Signature& expected : expected_signatures(bundle)) {
    const auto found = module.method_meta(expected.method);
    if (!found.ok()) throw Error(file + ": " + expected.method + " cannot be read");
    try {
      check_signature(*found, expected);
    } catch (const Error& error) {
      throw Error(file + ": " + error.what() + "; export or copy the bundle again");
    }
  }
}

}  // namespace runner
