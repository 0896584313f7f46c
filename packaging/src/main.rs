//! Writes what is made from the command lines of the programs: `cargo run -p packaging -- DIR` puts the man pages into
//! `DIR/man` and the shell completions into `DIR/bash`, `DIR/zsh` and `DIR/fish`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap_complete::{Shell, generate_to};
use packaging::manual;

/// The man pages as they are written by hand.
const PAGES: [(&str, &str); 6] = [
    ("usbpolicyctl.1", include_str!("../man/usbpolicyctl.1")),
    ("usbpolicyd.toml.5", include_str!("../man/usbpolicyd.toml.5")),
    ("usbpolicyd-protocol.7", include_str!("../man/usbpolicyd-protocol.7")),
    ("usbpolicyd.8", include_str!("../man/usbpolicyd.8")),
    ("usbpolicyd-sysfs.8", include_str!("../man/usbpolicyd-sysfs.8")),
    ("usbvfiod.8", include_str!("../man/usbvfiod.8")),
];

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next(), arguments.next()) else {
        bail!("usage: packaging DIR (writes man pages and completions below it)");
    };
    let directory = PathBuf::from(directory);
    let pages = below(&directory, "man")?;
    for (name, text) in PAGES {
        let program = packaging::programs()
            .into_iter()
            .find(|(program, section)| name == format!("{}.{section}", program.get_name()));
        let reference = program.map(|(mut program, _)| {
            program.build();
            manual::reference(&program)
        });
        let text = text.replace(&format!("{}\n", manual::MARK), &reference.unwrap_or_default());
        fs::write(pages.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let completions = below(&directory, name)?;
        for (mut program, _) in packaging::programs() {
            let called = program.get_name().to_owned();
            generate_to(shell, &mut program, called, &completions)
                .with_context(|| format!("cannot write completions into {}", completions.display()))?;
        }
    }
    Ok(())
}

fn below(directory: &Path, name: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}
