//! tools/lab
