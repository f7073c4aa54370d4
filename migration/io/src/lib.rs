//! migration/io
