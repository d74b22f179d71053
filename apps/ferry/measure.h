// When this process began (Linux: /proc).
#pragma once

namespace ferry::cli {

// Seconds since the process was started, to 10 ms.
double seconds_since_process_start();

}  // namespace ferry::cli
