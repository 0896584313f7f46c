//! Writes the shell completions of all programs into a directory: `cargo run -p packaging -- DIR`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap_complete::{Shell, generate_to};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next(), arguments.next()) else {
        bail!("usage: packaging DIR (writes bash, zsh and fish completions below it)");
    };
    let directory = PathBuf::from(directory);
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let below = directory.join(name);
        std::fs::create_dir_all(&below).with_context(|| format!("cannot make {}", below.display()))?;
        for (mut program, _) in packaging::programs() {
            let called = program.get_name().to_owned();
            generate_to(shell, &mut program, called, &below)
                .with_context(|| format!("cannot write completions into {}", below.display()))?;
        }
    }
    Ok(())
}
