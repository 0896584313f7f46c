//! `usbpolicyctl`: one module for each verb. Verbs that need the daemon talk to its admin socket; `check`, `explain`,
//! `plan`, `diff` and `generate` can do without it.

mod check;
mod text;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Shows and steers which USB device goes to which virtual machine.
#[derive(Debug, Parser)]
#[command(name = "usbpolicyctl", version, about, max_term_width = 100, after_help = EXIT_HELP)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_HELP: &str =
    "Exit status: 0 all well, 1 something was found or refused, 2 wrong usage or unusable input.";

#[derive(Debug, Subcommand)]
enum Verb {
    Check(check::Args),
}

/// How a verb ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All well; exit status 0.
    Done,
    /// It worked, and the answer is a problem or a refusal; exit status 1.
    Found,
    /// Wrong usage or unusable input; exit status 2.
    Unusable,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::Found => Self::from(1),
            Outcome::Unusable => Self::from(2),
        }
    }
}

/// Runs the verb of this process's command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = io::stdout().lock();
    let result = run(&cli, &mut out).and_then(|outcome| {
        out.flush()?;
        Ok(outcome)
    });
    match result {
        Ok(outcome) => outcome.into(),
        Err(error) if is_closed_pipe(&error) => Outcome::Done.into(),
        Err(error) => {
            eprintln!("usbpolicyctl: {error:#}");
            Outcome::Unusable.into()
        }
    }
}

fn run(cli: &Cli, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match &cli.verb {
        Verb::Check(args) => check::run(args, out),
    }
}

/// `usbpolicyctl … | head` is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
