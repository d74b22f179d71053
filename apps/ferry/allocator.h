// How bin/ferry allocates. What is measured beside it is linked with the same (bench/end_to_end).
#pragma once

namespace ferry::cli {

// Call first thing in main(). Does nothing where FERRY_WITH_JEMALLOC is off.
void set_up_allocator();

}  // namespace ferry::cli
