# SPDX-License-Identifier: MIT
# make install: libraries, headers, command, pkg-config file, CMake package, man pages.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS entrepot entrepot_static EXPORT entrepot-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/entrepot DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

# The baseline program lies beside the command, which looks for it there.
foreach(program entrepot_command entrepot_mpi_baseline)
  if(TARGET ${program})
    set_target_properties(${program} PROPERTIES
      INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
    install(TARGETS ${program} DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()

set(ep_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/entrepot)
install(EXPORT entrepot-targets NAMESPACE entrepot:: DESTINATION ${ep_package_dir})
configure_package_config_file(cmake/entrepot-config.cmake.in
  ${PROJECT_BINARY_DIR}/entrepot-config.cmake INSTALL_DESTINATION ${ep_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/entrepot-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/entrepot-config.cmake
  ${PROJECT_BINARY_DIR}/entrepot-config-version.cmake DESTINATION ${ep_package_dir})

# The prefix may be chosen as late as `cmake --install --prefix`, so the file is written then.
install(CODE "
  set(CMAKE_INSTALL_LIBDIR \"${CMAKE_INSTALL_LIBDIR}\")
  set(CMAKE_INSTALL_INCLUDEDIR \"${CMAKE_INSTALL_INCLUDEDIR}\")
  set(PROJECT_DESCRIPTION \"${PROJECT_DESCRIPTION}\")
  set(PROJECT_VERSION \"${PROJECT_VERSION}\")
  configure_file(\"${PROJECT_SOURCE_DIR}/cmake/entrepot.pc.in\"
    \"${PROJECT_BINARY_DIR}/entrepot.pc\" @ONLY)")
install(FILES ${PROJECT_BINARY_DIR}/entrepot.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES docs/man/entrepot.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
install(FILES docs/man/entrepot.3 DESTINATION ${CMAKE_INSTALL_MANDIR}/man3)
