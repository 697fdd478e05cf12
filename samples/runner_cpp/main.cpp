// skipstone-runner BUNDLE --tokens 1,2,3 --max-new-tokens N: continues a prompt of token ids.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "bundle.h"
#include "error.h"
#include "generate.h"
#include "program.h"

namespace runner {

namespace {

constexpr char kUsage[] =
    "usage: skipstone-runner BUNDLE --tokens ID,ID,… --max-new-tokens N [--strategy plain|layerskip]\n"
    "                        [--draft-length K] [--masked] [--separate-state] [--json]\n"
    "  --strategy        plain: token by token; layerskip: the first segment drafts, the rest verifies (default)\n"
    "  --draft-length    drafts per round of layerskip (default 4)\n"
    "  --masked          rows through the kernel that trees take, with masks; the output is the same\n"
    "  --separate-state  every method keeps its own K/V, as ExecuTorch's Android library loads programs\n"
    "  --json            one line of JSON\n";

struct Options {
  std::string bundle;
  std::vector<int64_t> tokens;
  Limits limits{0, 4};
  bool plain = false;
  ProgramOptions program;
  bool json = false;
  bool help = false;
};

int64_t parse_integer(const std::string& flag, const std::string& text, int64_t low) {
  constexpr int64_t kMost = 1'000'000'000;
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, wrong] = std::from_chars(text.data(), end, value);
  if (wrong != std::errc() || stop != end || value < low || value > kMost) {
    throw UsageError(flag + ": \"" + text + "\" is not an integer from " + std::to_string(low) + " to " +
                     std::to_string(kMost));
  }
  return value;
}

std::vector<int64_t> parse_tokens(const std::string& text) {
  std::vector<int64_t> tokens;
  for (size_t from = 0; from <= text.size();) {
    const size_t comma = std::min(text.find(',', from), text.size());
    tokens.push_back(parse_integer("--tokens", text.substr(from, comma - from), 0));
    from = comma + 1;
  }
  return tokens;
}

void parse_flag(Options& options, const std::string& flag, const std::vector<std::string>& arguments, size_t& place) {
  const auto value = [&]() -> const std::string& {
    if (++place >= arguments.size()) throw UsageError(flag + " needs a value");
    return arguments[place];
  };
  if (flag == "--tokens") {
    options.tokens = parse_tokens(value());
  } else if (flag == "--max-new-tokens") {
    options.limits.max_new_tokens = parse_integer(flag, value(), 1);
  } else if (flag == "--draft-length") {
    options.limits.draft_length = parse_integer(flag, value(), 1);
  } else if (flag == "--strategy") {
    const std::string& name = value();
    if (name != "plain" && name != "layerskip") {
      throw UsageError("--strategy: \"" + name + "\" is unknown; expected plain or layerskip");
    }
    options.plain = name == "plain";
  } else if (flag == "--separate-state") {
    options.program.shared_state = false;
  } else if (flag == "--masked") {
    options.program.masked = true;
  } else if (flag == "--json") {
    options.json = true;
  } else if (flag == "--help") {
    options.help = true;
  } else {
    throw UsageError(flag + ": unknown flag; see --help");
  }
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t place = 0; place < arguments.size(); ++place) {
    const std::string argument = arguments[place];
    if (argument.rfind("--", 0) == 0) {
      parse_flag(options, argument, arguments, place);
    } else if (options.bundle.empty()) {
      options.bundle = argument;
    } else {
      throw UsageError(argument + ": a second bundle; one is expected");
    }
  }
  if (options.help) return options;
  if (options.bundle.empty()) throw UsageError("no bundle given; see --help");
  if (options.tokens.empty()) throw UsageError("--tokens is missing");
  if (options.limits.max_new_tokens == 0) throw UsageError("--max-new-tokens is missing");
  if (options.plain) options.limits.draft_length = 0;
  return options;
}

void print(const Generation& made, bool json) {
  std::string tokens;
  for (const int64_t token : made.tokens) tokens += (tokens.empty() ? "" : ",") + std::to_string(token);
  const double decoded = static_cast<double>(made.tokens.size()) - 1;
  const double speed = made.decode_seconds > 0 ? decoded / made.decode_seconds : 0;
  const char* format = json ? "{\"tokens\": [%s], \"rounds\": %lld, \"drafted\": %lld, \"accepted\": %lld, "
                              "\"mask_slots\": %lld, \"prefill_seconds\": %.6f, \"tokens_per_second\": %.3f}\n"
                            : "tokens: %s\nrounds: %lld, drafted: %lld, accepted: %lld; mask slots: %lld\n"
                              "prefill: %.4f s, then %.1f tokens/s\n";
  std::printf(format, tokens.c_str(), static_cast<long long>(made.rounds), static_cast<long long>(made.drafted),
              static_cast<long long>(made.accepted), static_cast<long long>(made.mask_slots), made.prefill_seconds, speed);
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw Error("standard output cannot be written");
}

int run(const std::vector<std::string>& arguments) {
  const Options options = parse(arguments);
  if (options.help) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  Program program(open_bundle(options.bundle), options.program);
  if (!program.bundle().tested) {
    std::fprintf(stderr, "skipstone-runner: warning: %s: compiled on a machine without its target %s, so it went through no "
                 "self-test; compare its output with the checkpoint's\n",
                 program.bundle().program.string().c_str(), program.bundle().target.c_str());
  }
  print(generate(program, options.tokens, options.limits), options.json);
  return 0;
}

}  // namespace

}  // namespace runner

int main(int count, char** arguments) {
  try {
    return runner::run({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "skipstone-runner: %s\n", error.what());
    return 2;
  }
}
