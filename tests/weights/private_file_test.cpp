#include "ferry/weights/private_file.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "ferry/weights/stub.h"

namespace ferry::weights {
namespace {

int64_t space_of(const StoredTensor& stored) {
  struct stat found {};
  EXPECT_EQ(::fstat(stored.file->buffered_fd(), &found), 0);
  return found.st_blocks * 512;
}

// An optimiser writes every weight at every step.
TEST(PrivateFile, WhatIsWrittenAgainTakesTheSpaceOnce) {
  for (PrivateHome home : {PrivateHome::disk, PrivateHome::memory}) {
    const std::vector<BoundSlot> slots = {{{{"w"}, make_stub({1 << 18}, at::kFloat)}, {}}};
    const at::Tensor other = at::randn({1 << 18});
    const StoredTensor kept = write_private_file(slots, {other}, home).front();
    StoredTensor stored;
    for (int step = 0; step < 10; ++step) {
      const at::Tensor value = at::randn({1 << 18});
      stored = write_private_file(slots, {value}, home).front();
      EXPECT_TRUE(read_stored(stored).equal(value));
    }
    EXPECT_LT(space_of(stored), 3 << 20) << "one MiB each of two";
    EXPECT_TRUE(read_stored(kept).equal(other));
  }
}

}  // namespace
}  // namespace ferry::weights
