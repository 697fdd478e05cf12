// SHA-256 (FIPS 180-4) of a file, as the manifest lists it.
#pragma once

#include <filesystem>
#include <string>

namespace runner {

// Lower-case hexadecimal; the file is read piece by piece. Throws Error where it cannot be read.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace runner
