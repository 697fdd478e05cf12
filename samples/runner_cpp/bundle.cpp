#include "bundle.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace runner {

namespace {

namespace fs = std::filesystem;

constexpr int64_t kSchemaVersion = 1;
constexpr int64_t kProgramInterface = 2;                         // what the methods mean: docs/executorch.md
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // ExecuTorch's sizes are int32

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::error_code unknown;
  if (!file || fs::is_directory(path, unknown)) throw Error(path.string() + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// A file of the bundle: inside the folder, listed in the manifest, of the size and hash listed there.
fs::path listed_file(const fs::path& folder, const Json& manifest, const std::string& key) {
  const std::string& name = manifest.text(key);
  const fs::path relative(name);
  const bool leaves = std::find(relative.begin(), relative.end(), "..") != relative.end();
  const bool unsafe = name.find_first_of(std::string("\\:\0", 3)) != std::string::npos;
  if (name.empty() || relative.is_absolute() || leaves || unsafe) {
    throw Error(key + " \"" + name + "\" is not a path inside the bundle");
  }
  for (const Json& entry : manifest.array("files")) {
    if (entry.text("path") != name) continue;
    const auto expected = static_cast<uintmax_t>(entry.integer("size", 0, int64_t{1} << 53));
    std::error_code missing;
    const uintmax_t found = fs::file_size(folder / relative, missing);
    if (missing) throw Error(name + " is missing; copy or export the bundle again");
    if (found != expected) {
      throw Error(name + " has " + std::to_string(found) + " bytes; the manifest says " + std::to_string(expected) +
                  "; copy or export the bundle again");
    }
    if (sha256_of_file(folder / relative) != entry.text("sha256")) {
      throw Error(name + " is damaged: its SHA-256 is not the one listed; copy or export the bundle again");
    }
    return folder / relative;
  }
  throw Error(name + " is not listed under files");
}

std::vector<int64_t> integers(const Json& manifest, const std::string& key, int64_t low, int64_t high) {
  std::vector<int64_t> found;
  for (const Json& item : manifest.array(key)) found.push_back(item.as_integer(key, low, high));
  return found;
}

std::vector<int64_t> read_vocabulary(const fs::path& path, int64_t vocab_size) {
  const std::string bytes = read_file(path);
  std::vector<int64_t> tokens;
  for (size_t place = 0; place + 4 <= bytes.size(); place += 4) {
    uint32_t token = 0;  // little-endian, whatever this machine is
    for (size_t byte = 0; byte < 4; ++byte) token |= uint32_t{static_cast<uint8_t>(bytes[place + byte])} << (8 * byte);
    if (token >= static_cast<uint64_t>(vocab_size)) {
      throw Error(path.filename().string() + ": token " + std::to_string(token) + " is not in the vocabulary");
    }
    tokens.push_back(token);
  }
  if (tokens.empty() || bytes.size() % 4 != 0) {
    throw Error(path.filename().string() + ": " + std::to_string(bytes.size()) + " bytes are no list of int32");
  }
  return tokens;
}

std::vector<std::string> expected_methods(int64_t num_segments, bool drafts) {
  std::vector<std::string> names = {"compact", "embed", "head"};
  if (drafts) names.push_back("draft_head");
  for (int64_t k = 0; k < num_segments; ++k) names.push_back("segment_" + std::to_string(k));
  std::sort(names.begin(), names.end());
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// Manifests from before the number was introduced have none: they are of interface 1.
void check_interface(const Json& manifest) {
  const std::string key = "program.interface";
  const int64_t found = manifest.is_null(key) ? 1 : manifest.integer(key, 1, kMost);
  if (found == kProgramInterface) return;
  throw Error(key + " is " + std::to_string(found) + "; this runner calls interface " +
              std::to_string(kProgramInterface) + "; " +
              (found < kProgramInterface ? "export the bundle again" : "build the runner that came with the exporter"));
}

bool is_tested(const Json& manifest) {
  const std::string status = manifest.is_null("program.status") ? "runs" : manifest.text("program.status");
  if (status != "runs" && status != "compiled") {
    throw Error("program.status is \"" + status + "\"; expected \"runs\" or \"compiled\"");
  }
  return status == "runs";
}

Bundle read_manifest(const fs::path& folder, const Json& manifest) {
  if (manifest.text("format") != "executorch") {
    throw Error("format is \"" + manifest.text("format") + "\"; expected \"executorch\"");
  }
  manifest.integer("schema_version", kSchemaVersion, kSchemaVersion);
  check_interface(manifest);
  Bundle bundle;
  bundle.target = manifest.text("program.target");
  bundle.tested = is_tested(manifest);
  bundle.hidden_size = manifest.integer("model.hidden_size", 1, kMost);
  bundle.vocab_size = manifest.integer("model.vocab_size", 1, kMost);
  bundle.num_segments = static_cast<int64_t>(manifest.array("exits").size()) + 1;
  bundle.slots = manifest.integer("program.slots", 1, kMost);
  bundle.capacity = std::min(bundle.slots, manifest.integer("model.context_length", 1, kMost));
  bundle.max_width = manifest.integer("program.max_width", 1, bundle.slots);
  bundle.reference_width = manifest.integer("program.reference_width", 1, bundle.max_width);
  bundle.eos_token_ids = integers(manifest, "model.eos_token_ids", 0, bundle.vocab_size - 1);
  const bool drafts = !manifest.is_null("program.draft_vocabulary");
  for (const Json& method : manifest.array("program.methods")) bundle.methods.push_back(method.text("name"));
  std::sort(bundle.methods.begin(), bundle.methods.end());
  const auto expected = expected_methods(bundle.num_segments, drafts);
  if (bundle.methods != expected) {
    throw Error("program.methods are " + joined(bundle.methods) + "; expected " + joined(expected));
  }
  if (drafts) {
    const fs::path path = listed_file(folder, manifest, "program.draft_vocabulary");
    bundle.draft_vocabulary = read_vocabulary(path, bundle.vocab_size);
  }
  bundle.program = listed_file(folder, manifest, "program.file");
  return bundle;
}

}  // namespace

Bundle open_bundle(const fs::path& folder) {
  std::error_code unknown;
  if (!fs::is_directory(folder, unknown)) throw Error(folder.string() + ": no such folder");
  const fs::path path = folder / "manifest.json";
  const std::string text = read_file(path);
  try {
    return read_manifest(folder, Json::parse(text));
  } catch (const Error& error) {
    throw Error(path.string() + ": " + error.what());
  }
}

}  // namespace runner
