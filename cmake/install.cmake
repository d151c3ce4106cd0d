# SPDX-License-Identifier: MIT
include(GNUInstallDirs)
install(TARGETS entrepot entrepot_static EXPORT entrepot-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/entrepot DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET entrepot_command)
  install(TARGETS entrepot_command DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
