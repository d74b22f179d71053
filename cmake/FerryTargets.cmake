# ferry_library(NAME SOURCES ... [LIBS ...] [TORCH]): one static library a folder of src/ferry.
# TORCH gives it the wheel's headers and, outside debug tools, the shared precompiled header.
function(ferry_library name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_include_directories(${name} PUBLIC
    "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/src>"
    "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>")
  target_link_libraries(${name} PUBLIC ferry_options ${ARG_LIBS})
  if(ARG_TORCH)
    ferry_use_torch(${name})
  else()
    target_link_libraries(${name} PUBLIC ferry::fmt)
  endif()
  set_property(GLOBAL APPEND PROPERTY FERRY_LIBRARIES ${name})
endfunction()

# ferry_use_torch(TARGET): libtorch and the precompiled torch headers.
function(ferry_use_torch name)
  target_link_libraries(${name} PUBLIC ferry_options ferry::torch)
  if(FERRY_PCH AND NOT name STREQUAL "ferry_pch")
    # The compiler takes a precompiled header only for the same code model: -fPIC, not -fPIE.
    get_target_property(type ${name} TYPE)
    if(type STREQUAL "EXECUTABLE")
      set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
      target_compile_options(${name} PRIVATE -fPIC)
    endif()
    target_precompile_headers(${name} REUSE_FROM ferry_pch)
  endif()
endfunction()

# ferry_test(NAME SOURCES ... LIBS ... [TORCH] [LABELS ...]): one GoogleTest program, one ctest entry.
function(ferry_test name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;LIBS;LABELS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE
    FERRY_FIXTURES="${PROJECT_SOURCE_DIR}/tests/fixtures" FERRY_MODELS="${PROJECT_SOURCE_DIR}/models")
  if(ARG_TORCH)
    ferry_use_torch(${name})
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT 900
    ENVIRONMENT "OMP_NUM_THREADS=2;FERRY_CACHE_DIR=${PROJECT_BINARY_DIR}/test-cache")
endfunction()
