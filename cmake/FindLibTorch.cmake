# Finds libtorch in the PyPI wheel (or any tree named by TORCH_DIR) without find_package(Torch),
# which insists on nvcc for the CUDA wheel. No CUDA toolkit is needed: only c10 and torch_cpu are
# linked, and src/ferry/tensor/device.cpp opens libtorch_cuda.so at run time where a driver is.
#
# Targets: ferry::torch  headers, c10, torch_cpu, OpenMP
#          ferry::fmt    the {fmt} headers that come with the wheel, header-only
#
# Looks in: -DTORCH_DIR, $TORCH_DIR, .venv in the source tree. A directory matches if it holds
# lib/libtorch_cpu.so, also below lib/python3*/site-packages/torch.

set(_hints "")
foreach(_root IN ITEMS "${TORCH_DIR}" "$ENV{TORCH_DIR}" "${CMAKE_CURRENT_SOURCE_DIR}/.venv")
  if(_root)
    file(GLOB _venvs "${_root}/lib/python3*/site-packages/torch")
    list(APPEND _hints "${_root}" ${_venvs})
  endif()
endforeach()

find_path(LibTorch_ROOT NAMES lib/libtorch_cpu.so HINTS ${_hints} NO_DEFAULT_PATH)
if(LibTorch_ROOT AND EXISTS "${LibTorch_ROOT}/version.py")
  file(STRINGS "${LibTorch_ROOT}/version.py" _version REGEX "^__version__ = ")
  string(REGEX REPLACE ".*'([0-9.]+).*" "\\1" LibTorch_VERSION "${_version}")
elseif(LibTorch_ROOT AND EXISTS "${LibTorch_ROOT}/build-version")
  file(STRINGS "${LibTorch_ROOT}/build-version" LibTorch_VERSION)
  string(REGEX REPLACE "[+].*" "" LibTorch_VERSION "${LibTorch_VERSION}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_ROOT
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "run 'make deps', or pass -DTORCH_DIR=<libtorch or a venv with torch>")

if(LibTorch_FOUND AND NOT TARGET ferry::torch)
  find_package(OpenMP REQUIRED COMPONENTS CXX)
  add_library(ferry::fmt INTERFACE IMPORTED)
  # A directory of symlinks would be needed to expose fmt alone; the include folder is cheap to name.
  target_include_directories(ferry::fmt SYSTEM INTERFACE "${LibTorch_ROOT}/include")
  target_compile_definitions(ferry::fmt INTERFACE FMT_HEADER_ONLY)

  add_library(ferry::torch INTERFACE IMPORTED)
  target_include_directories(ferry::torch SYSTEM INTERFACE
    "${LibTorch_ROOT}/include" "${LibTorch_ROOT}/include/torch/csrc/api/include")
  # -fopenmp: without it at::parallel_for in our own sources is silently serial. Which suits fuzzing:
  # clang's code calls a runtime that libgomp is not.
  if(NOT FERRY_FUZZ)
    target_compile_options(ferry::torch INTERFACE ${OpenMP_CXX_FLAGS})
  endif()
  # The OpenMP runtime that torch itself uses: a second one would compete with it for the cores.
  file(GLOB _gomp "${LibTorch_ROOT}/lib/libgomp*.so*")
  target_link_libraries(ferry::torch INTERFACE
    "${LibTorch_ROOT}/lib/libtorch_cpu.so" "${LibTorch_ROOT}/lib/libc10.so" ${_gomp} ferry::fmt ${CMAKE_DL_LIBS})
endif()
mark_as_advanced(LibTorch_ROOT)
