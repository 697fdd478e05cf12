#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "error.h"

namespace runner {

namespace {

constexpr int kDeepest = 64;               // a manifest needs 5; the reader recurses
constexpr int64_t kExact = int64_t{1} << 53;  // integers up to here are exact as doubles

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json json = value(0);
    skip_space();
    if (place_ != text_.size()) fail("nothing more");
    return json;
  }

 private:
  [[noreturn]] void fail(const std::string& expected) const {
    throw Error("not JSON at byte " + std::to_string(place_) + ": expected " + expected);
  }

  char peek() const { return place_ < text_.size() ? text_[place_] : '\0'; }

  void skip_space() {
    while (place_ < text_.size() && std::string_view(" \t\r\n").find(text_[place_]) != std::string_view::npos) ++place_;
  }

  bool take(char c) {
    skip_space();
    if (peek() != c || place_ == text_.size()) return false;
    ++place_;
    return true;
  }

  void need(char c) {
    if (!take(c)) fail(std::string("'") + c + "'");
  }

  bool take_word(std::string_view word) {
    if (text_.substr(place_, word.size()) != word) return false;
    place_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("at most " + std::to_string(kDeepest) + " levels");
    skip_space();
    Json json;
    if (peek() == '{') {
      json.value_ = object(depth);
    } else if (peek() == '[') {
      json.value_ = array(depth);
    } else if (peek() == '"') {
      json.value_ = string();
    } else if (take_word("true")) {
      json.value_ = true;
    } else if (take_word("false")) {
      json.value_ = false;
    } else if (!take_word("null")) {
      json.value_ = number();
    }
    return json;
  }

  Json::Object object(int depth) {
    Json::Object members;
    need('{');
    if (take('}')) return members;
    do {
      skip_space();
      if (peek() != '"') fail("a key");
      std::string key = string();
      need(':');
      members.emplace_back(std::move(key), value(depth + 1));
    } while (take(','));
    need('}');
    return members;
  }

  Json::Array array(int depth) {
    Json::Array items;
    need('[');
    if (take(']')) return items;
    do {
      items.push_back(value(depth + 1));
    } while (take(','));
    need(']');
    return items;
  }

  std::string string() {
    std::string out;
    ++place_;
    while (place_ < text_.size() && text_[place_] != '"') {
      const char c = text_[place_++];
      if (static_cast<unsigned char>(c) < 0x20) fail("no control character in a string");
      if (c != '\\') {
        out += c;
      } else {
        escape(out);
      }
    }
    if (place_ == text_.size()) fail("'\"'");
    ++place_;
    return out;
  }

  void escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const char c = peek();
    const size_t known = kNames.find(c);
    if (place_ < text_.size() && known != std::string_view::npos) {
      ++place_;
      out += kMeant[known];
    } else if (c == 'u') {
      ++place_;
      append_utf8(out, code_point());
    } else {
      fail("an escape");
    }
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int digit = 0; digit < 4; ++digit, ++place_) {
      const char c = static_cast<char>(peek() | 0x20);
      if (is_digit(peek())) {
        code = code * 16 + static_cast<uint32_t>(peek() - '0');
      } else if (c >= 'a' && c <= 'f') {
        code = code * 16 + static_cast<uint32_t>(c - 'a' + 10);
      } else {
        fail("four hexadecimal digits");
      }
    }
    return code;
  }

  // Characters past U+FFFF are written as a surrogate pair.
  uint32_t code_point() {
    const uint32_t high = hex4();
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || !take_word("\\u")) fail("a surrogate pair");
    const uint32_t low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("a surrogate pair");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  void digits() {
    if (!is_digit(peek())) fail("a value");
    while (is_digit(peek())) ++place_;
  }

  double number() {
    const size_t first = place_;
    if (peek() == '-') ++place_;
    if (peek() == '0') {
      ++place_;
    } else {
      digits();
    }
    if (peek() == '.') ++place_, digits();
    if (peek() == 'e' || peek() == 'E') {
      ++place_;
      if (peek() == '+' || peek() == '-') ++place_;
      digits();
    }
    return std::strtod(std::string(text_.substr(first, place_ - first)).c_str(), nullptr);
  }

  std::string_view text_;
  size_t place_ = 0;
};

Json Json::parse(const std::string& text) { return JsonReader(text).document(); }

const Json* Json::find(const std::string& path) const {
  const Json* json = this;
  for (size_t from = 0; from <= path.size();) {
    const size_t dot = std::min(path.find('.', from), path.size());
    const std::string key = path.substr(from, dot - from);
    const auto* members = std::get_if<Object>(&json->value_);
    const Json* found = nullptr;
    if (members) {
      for (const auto& [name, member] : *members) {
        if (name == key) found = &member;
      }
    }
    if (!found) return nullptr;
    json = found;
    from = dot + 1;
  }
  return json;
}

const Json& Json::at(const std::string& path) const {
  const Json* found = find(path);
  if (!found) throw Error(path + " is missing");
  return *found;
}

int64_t Json::integer(const std::string& path, int64_t low, int64_t high) const {
  return at(path).as_integer(path, low, high);
}

int64_t Json::as_integer(const std::string& path, int64_t low, int64_t high) const {
  const auto* number = std::get_if<double>(&value_);
  if (!number || std::floor(*number) != *number || std::fabs(*number) > static_cast<double>(kExact)) {
    throw Error(path + " is not an integer");
  }
  const auto found = static_cast<int64_t>(*number);
  if (found < low || found > high) {
    throw Error(path + " is " + std::to_string(found) + "; expected " + std::to_string(low) + " to " +
                std::to_string(high));
  }
  return found;
}

const std::string& Json::text(const std::string& path) const {
  const auto* text = std::get_if<std::string>(&at(path).value_);
  if (!text) throw Error(path + " is not a string");
  return *text;
}

const Json::Array& Json::array(const std::string& path) const {
  const auto* array = std::get_if<Array>(&at(path).value_);
  if (!array) throw Error(path + " is not an array");
  return *array;
}

bool Json::is_null(const std::string& path) const {
  const Json* found = find(path);
  return !found || std::holds_alternative<std::nullptr_t>(found->value_);
}

}  // namespace runner
