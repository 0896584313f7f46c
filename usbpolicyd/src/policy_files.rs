//! Finds and reads the files of the policy. This is the only code that opens them; `policy` sees text.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::policy::load::{FILE_MAX, Layer, Source};

/// The vendor's drop-ins.
pub const VENDOR_DIR: &str = "/usr/lib/usbpolicyd/policy.d";
/// The main file.
pub const MAIN_FILE: &str = "/etc/usbpolicyd/policy.toml";
/// The administrator's drop-ins.
pub const LOCAL_DIR: &str = "/etc/usbpolicyd/policy.d";

/// The most files in one directory.
const FILES_MAX: usize = 1024;

/// A file of the policy cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}", path.display())]
pub struct ReadError {
    /// Which file or directory.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Where the files of a policy are.
#[derive(Clone, Debug)]
pub struct Places {
    /// The vendor's drop-ins.
    pub vendor_dir: PathBuf,
    /// The main file.
    pub main_file: PathBuf,
    /// The administrator's drop-ins.
    pub local_dir: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { vendor_dir: VENDOR_DIR.into(), main_file: MAIN_FILE.into(), local_dir: LOCAL_DIR.into() }
    }
}

impl Places {
    /// Reads all files. What does not exist is no mistake: without any file, everything stays with the host.
    pub fn read(&self) -> Result<Vec<Source>, ReadError> {
        let mut sources = read_dir(&self.vendor_dir, Layer::Vendor)?;
        match read_file(&self.main_file, Layer::Main) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
            other => sources.push(other?),
        }
        sources.extend(read_dir(&self.local_dir, Layer::Local)?);
        Ok(sources)
    }
}

/// Reads one file, whatever its name, or the `*.toml` of one directory.
pub fn read_path(path: &Path, layer: Layer) -> Result<Vec<Source>, ReadError> {
    if path.is_dir() { read_dir(path, layer) } else { Ok(vec![read_file(path, layer)?]) }
}

fn read_dir(dir: &Path, layer: Layer) -> Result<Vec<Source>, ReadError> {
    let failed = |source| ReadError { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    if paths.len() > FILES_MAX {
        return Err(failed(io::Error::other(format!("more than {FILES_MAX} files"))));
    }
    paths.sort();
    paths.iter().map(|path| read_file(path, layer)).collect()
}

fn read_file(path: &Path, layer: Layer) -> Result<Source, ReadError> {
    let failed = |source| ReadError { path: path.to_owned(), source };
    let mut text = String::new();
    let limit = u64::try_from(FILE_MAX).unwrap_or(u64::MAX).saturating_add(1);
    File::open(path).map_err(failed)?.take(limit).read_to_string(&mut text).map_err(failed)?;
    Ok(Source { layer, path: path.display().to_string(), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_ins_of_both_directories_are_found_and_other_files_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let places = Places {
            vendor_dir: root.path().join("vendor"),
            main_file: root.path().join("policy.toml"),
            local_dir: root.path().join("local"),
        };
        fs::create_dir_all(&places.vendor_dir).unwrap();
        fs::write(places.vendor_dir.join("10-x.toml"), "schema = 1").unwrap();
        fs::write(places.vendor_dir.join("10-x.toml.bak"), "junk").unwrap();
        fs::write(&places.main_file, "schema = 1").unwrap();
        let layers: Vec<Layer> = places.read().unwrap().iter().map(|source| source.layer).collect();
        assert_eq!(layers, [Layer::Vendor, Layer::Main]);
    }

    #[test]
    fn file_that_is_no_text_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("policy.toml");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        let error = read_path(&path, Layer::Main).unwrap_err();
        assert!(error.to_string().contains("policy.toml"));
    }
}
