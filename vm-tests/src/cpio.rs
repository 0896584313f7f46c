//! Writes initramfs archives (cpio "newc", kernel `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Archives may be appended to each other; the kernel unpacks them one after the other.

use std::collections::BTreeSet;

/// An archive under construction; directories above an entry are made by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory (path without leading slash) and those above it.
    pub fn directory(&mut self, path: &str) {
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        self.parents(path);
        self.directories.insert(path.to_owned());
        self.entry(path, 0o040_755, &[]);
    }

    /// Adds an ordinary file, executable or not.
    pub fn file(&mut self, path: &str, content: &[u8], is_executable: bool) {
        self.parents(path);
        self.entry(path, if is_executable { 0o100_755 } else { 0o100_644 }, content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, 0o120_777, target.as_bytes());
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let length = u32::try_from(content.len()).expect("files of an initramfs are small");
        let name_length = u32::try_from(path.len() + 1).expect("paths are short");
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_directories_come_first_and_once() {
        let mut archive = Archive::new();
        archive.file("lib/modules/a.ko", b"12345", false);
        archive.file("lib/modules/b.ko", b"", false);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(b"070701")).collect();
        let name = |at: usize| {
            let name = &bytes[at + 110..];
            String::from_utf8_lossy(&name[..name.iter().position(|&b| b == 0).unwrap()]).into_owned()
        };
        let names: Vec<String> = names.into_iter().map(name).collect();
        assert_eq!(names, ["lib", "lib/modules", "lib/modules/a.ko", "lib/modules/b.ko", "TRAILER!!!"]);
    }
}
