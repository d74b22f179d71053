// The exceptions that ferry throws. Each message says what failed and where, what was found and
// what was expected, and what to do about it where that is known.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace ferry {

// Base of all errors below, so that an application can catch one type.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller passed something that cannot work: an unknown option, a shape that does not fit.
class ArgumentError : public Error {
 public:
  using Error::Error;
};

// Bytes that came from outside do not follow their format: a header that lies, broken JSON.
class FormatError : public Error {
 public:
  using Error::Error;
};

// The operating system refused or failed: a missing file, a short read, a full disk.
class IoError : public Error {
 public:
  using Error::Error;
};

// The accelerator or its memory failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

// A budget that cannot be kept; the message states the smallest one that can.
class BudgetError : public Error {
 public:
  using Error::Error;
};

// The work was stopped through a StopToken. Not a failure: the command line exits with 130.
class Cancelled : public Error {
 public:
  Cancelled() : Error("cancelled") {}
};

// throw_error<IoError>("{}: cannot open: {}", path, reason)
template <class E, class... Args>
[[noreturn]] void throw_error(fmt::format_string<Args...> format, Args&&... args) {
  throw E(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace ferry
