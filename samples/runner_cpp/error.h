// What a user can have done wrong, or a file can be: reported in one line.
#pragma once

#include <stdexcept>
#include <string>

namespace runner {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The command line: wrong in itself, or asking for what the bundle does not hold.
struct UsageError : Error {
  using Error::Error;
};

}  // namespace runner
