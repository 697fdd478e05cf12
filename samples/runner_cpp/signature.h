// What a program's methods take and give, compared with the manifest before anything is called.
#pragma once

#include <executorch/extension/module/module.h>

#include "bundle.h"

namespace runner {

// A program that does not fit its manifest would otherwise show late: as a failed call, as K and V past their buffer, or as
// logits read under the wrong token ids. Throws Error naming the first difference.
void check_signatures(executorch::extension::Module& module, const Bundle& bundle);

}  // namespace runner
