// A reader of JSON, as much of it as a manifest needs: it reads whole documents and looks values up by dotted path.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace runner {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  // Reads a document (RFC 8259). Throws Error naming the byte where it is not JSON.
  static Json parse(const std::string& text);

  // The value at a dotted path such as "program.slots". These throw Error naming the path when nothing stands there or
  // it has another type or lies outside [low, high].
  const Json& at(const std::string& path) const;
  int64_t integer(const std::string& path, int64_t low, int64_t high) const;
  const std::string& text(const std::string& path) const;
  const Array& array(const std::string& path) const;

  // Null, or nothing at all, stands at the path.
  bool is_null(const std::string& path) const;

  // This value as an array's element; `path` is for the error.
  int64_t as_integer(const std::string& path, int64_t low, int64_t high) const;

 private:
  const Json* find(const std::string& path) const;

  friend class JsonReader;
  using Value = std::variant<std::nullptr_t, bool, double, std::string, Array, Object>;
  Value value_ = nullptr;
};

}  // namespace runner
