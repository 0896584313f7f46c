//! Finds the programs of this workspace beside the running test, and brings them up to date first.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

/// What the host under test gets to run.
const PACKAGES: &[&str] = &["packaging", "usbpolicyd", "usbvfiod", "vm-tests"];

/// Directory with the built programs, up to date: `target/PROFILE` of the running test, or of `VM_TESTS_PROFILE`.
///
/// `cargo test -p vm-tests` builds no programs of other packages, and a stale daemon would make a test lie; so cargo
/// is asked once per process (a fraction of a second when nothing changed). `VM_TESTS_BIN_DIR` names ready-made ones.
pub fn directory() -> Result<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(directory) = std::env::var_os("VM_TESTS_BIN_DIR") {
        return Ok(directory.into());
    }
    let found = FOUND.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    found.clone().map_err(anyhow::Error::msg)
}

fn build() -> Result<PathBuf> {
    let test = std::env::current_exe().context("own path")?;
    let in_profile = |path: &Path| {
        path.parent().is_some_and(|above| above.ends_with("debug") || above.ends_with("release"))
    };
    let own = test
        .ancestors()
        .skip(1)
        .find(|path| in_profile(&path.join("x")))
        .context("not below a target directory")?;
    let own_profile = own.file_name().and_then(|name| name.to_str()).unwrap_or("debug");
    let profile = std::env::var("VM_TESTS_PROFILE").unwrap_or_else(|_| own_profile.to_owned());
    let target = own.parent().context("no target directory")?;

    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--bins", "--target-dir"]).arg(target);
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    cargo.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    match profile.as_str() {
        "release" => drop(cargo.arg("--release")),
        "debug" => {}
        other => bail!("VM_TESTS_PROFILE is `debug` or `release`, not `{other}`"),
    }
    let status = cargo.status().context("start cargo")?;
    if !status.success() {
        bail!("cargo could not build {}", PACKAGES.join(", "));
    }
    Ok(target.join(profile))
}

/// Puts a program into a directory that is shared with the host under test: a hard link where possible.
pub fn stage(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to)
        .or_else(|_| std::fs::copy(from, to).map(drop))
        .with_context(|| format!("put {} to {}", from.display(), to.display()))
}

/// Puts what [`crate::daemons::INSTALL`] installs into the shared directory.
pub(crate) fn stage_packaging(share: &Path) -> Result<()> {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging");
    for file in ["sysusers.d/usbpolicyd.conf", "tmpfiles.d/usbpolicyd.conf", "udev/70-usbpolicyd.rules"] {
        let (from, to) = (packaging.join(file), share.join("packaging").join(file));
        std::fs::create_dir_all(to.parent().unwrap_or(share))?;
        std::fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

/// A program without its debug information, most of its size: an emulated guest takes seconds to unpack that.
pub fn stripped(program: &Path) -> Result<Vec<u8>> {
    let file = tempfile::NamedTempFile::new()?;
    let status = Command::new("strip").arg("-o").arg(file.path()).arg(program).status();
    // Without binutils it is only slower.
    let small = status.is_ok_and(|status| status.success());
    let from = if small { file.path() } else { program };
    std::fs::read(from).with_context(|| format!("read {}", from.display()))
}
