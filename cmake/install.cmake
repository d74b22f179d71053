# `cmake --install`: bin/ferry, the libraries, headers and a CMake package. tools/collect_libs.sh
# (run by `make install`) adds libtorch and what else bin/ferry loads, so that the tree can be moved.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

get_property(_libraries GLOBAL PROPERTY FERRY_LIBRARIES)
install(TARGETS ${_libraries} ferry_options EXPORT ferryTargets
  ARCHIVE DESTINATION lib INCLUDES DESTINATION include)
add_library(ferry_all INTERFACE)
target_link_libraries(ferry_all INTERFACE ${_libraries})
set_target_properties(ferry_all PROPERTIES EXPORT_NAME ferry)
add_library(ferry::ferry ALIAS ferry_all)
install(TARGETS ferry_all EXPORT ferryTargets)

# bin/ferry, or lib/ferry/ferry where bin/ferry is a launcher (tools/collect_libs.sh --without-torch).
set_target_properties(ferry_cli PROPERTIES INSTALL_RPATH "$ORIGIN/../lib/ferry:$ORIGIN")
install(TARGETS ferry_cli RUNTIME DESTINATION bin)
install(DIRECTORY include/ferry src/ferry DESTINATION include FILES_MATCHING PATTERN "*.h")
install(EXPORT ferryTargets NAMESPACE ferry:: DESTINATION lib/cmake/ferry)
configure_package_config_file(cmake/ferry-config.cmake.in "${PROJECT_BINARY_DIR}/ferry-config.cmake"
  INSTALL_DESTINATION lib/cmake/ferry)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/ferry-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/ferry-config.cmake" "${PROJECT_BINARY_DIR}/ferry-config-version.cmake"
  cmake/FindLibTorch.cmake DESTINATION lib/cmake/ferry)
