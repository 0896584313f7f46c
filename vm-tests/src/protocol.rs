//! Lines of JSON between a test and the agent in a virtual machine: one message a line, both ways, over a virtio-serial
//! port. Bytes of a process travel as a string in which each byte is the character of the same number, so any
//! output survives and plain text stays readable in a trace.

use serde::{Deserialize, Serialize};

/// What the test asks for. `id` is chosen by the test and names the process in all later messages.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Start a program, with its own process group.
    Run {
        /// The name of this process from now on.
        id: u32,
        /// Program and arguments; the program is searched in `PATH`.
        argv: Vec<String>,
    },
    /// More bytes for its standard input.
    Input {
        /// Which process.
        id: u32,
        /// The bytes, see the module's text.
        data: String,
    },
    /// No more standard input.
    CloseInput {
        /// Which process.
        id: u32,
    },
    /// Look after interrupts that were lost. Its own interrupt counts as well, see [`crate::Remote::keep_awake`].
    Wake,
    /// Send a signal to its process group.
    Signal {
        /// Which process.
        id: u32,
        /// Signal number.
        signal: i32,
    },
}

/// What the agent tells.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The agent has started; after a reboot of the machine it says so again.
    Ready,
    /// Output of a process.
    Output {
        /// Which process.
        id: u32,
        /// Standard error instead of standard output.
        error: bool,
        /// The bytes, see the module's text.
        data: String,
    },
    /// The process has ended and all its output was sent, or it could not be started.
    Exit {
        /// Which process.
        id: u32,
        /// Exit status; 128 + signal number for a process that died of a signal; 127 when it could not be started.
        status: i32,
    },
}

/// Bytes as a string, one character per byte.
pub fn text_of(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

/// The bytes again. Characters above 255 cannot come from [`text_of`]; they become question marks.
pub fn bytes_of(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_byte_survives_the_line() {
        let all: Vec<u8> = (0..=255).collect();
        let line =
            serde_json::to_string(&Report::Output { id: 7, error: false, data: text_of(&all) }).unwrap();
        assert!(!line.contains('\n'));
        let Report::Output { data, .. } = serde_json::from_str(&line).unwrap() else { panic!("{line}") };
        assert_eq!(bytes_of(&data), all);
    }
}
