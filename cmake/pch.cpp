// Owner of the precompiled torch headers; see CMakeLists.txt.
