//! What a plain HTTP client gets of an API socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Result;

use crate::PATIENCE;

/// The whole answer to one request; the body is JSON, or empty.
pub fn http(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    http_as(socket, "application/json", method, path, body)
}

/// The same with a body that is said to be something else.
pub fn http_as(socket: &Path, content_type: &str, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE.longest))?;
    let len = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {content_type}\r\n\
         Content-Length: {len}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
