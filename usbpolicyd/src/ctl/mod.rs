//! `usbpolicyctl`: one module for each verb. Verbs that need the daemon talk to its admin socket; `check`, `explain`,
//! `plan`, `diff` and `generate` can do without it.

mod check;
mod diff;
mod doctor;
mod events;
mod explain;
mod generate;
mod host;
mod learn;
mod list;
mod online;
mod orders;
mod snapshot;
mod status;
mod text;
mod vm;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Shows and steers which USB device goes to which virtual machine.
#[derive(Debug, Parser)]
#[command(name = "usbpolicyctl", version, max_term_width = 80, after_help = EXIT_HELP)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_HELP: &str =
    "Exit status: 0 all well, 1 something was found or refused, 2 wrong usage or unusable input.";

#[derive(Debug, Subcommand)]
enum Verb {
    Check(check::Args),
    List(list::Args),
    Vm(vm::Args),
    Attach(orders::AttachArgs),
    Detach(orders::DetachArgs),
    Clear(orders::ClearArgs),
    Orders(orders::OrdersArgs),
    Revoke(orders::RevokeArgs),
    Log(events::LogArgs),
    Watch(events::WatchArgs),
    /// Load the policy again; a bad one is refused and the old one stays in force
    Reload(events::PlainArgs),
    Retry(events::RetryArgs),
    Status(status::Args),
    Explain(explain::Args),
    Plan(diff::PlanArgs),
    Diff(diff::DiffArgs),
    Generate(generate::Args),
    Snapshot(snapshot::Args),
    Learn(learn::Args),
    Doctor(doctor::Args),
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
        Verb::List(args) => list::run(args, out),
        Verb::Vm(args) => vm::run(args, out),
        Verb::Attach(args) => orders::attach(args, out),
        Verb::Detach(args) => orders::detach(args, out),
        Verb::Clear(args) => orders::clear(args, out),
        Verb::Orders(args) => orders::orders(args, out),
        Verb::Revoke(args) => orders::revoke(args, out),
        Verb::Log(args) => events::log(args, out),
        Verb::Watch(args) => events::watch(args, out),
        Verb::Reload(args) => events::reload(args, out),
        Verb::Retry(args) => events::retry(args, out),
        Verb::Status(args) => status::run(args, out),
        Verb::Explain(args) => explain::run(args, out),
        Verb::Plan(args) => diff::plan(args, out),
        Verb::Diff(args) => diff::diff(args, out),
        Verb::Generate(args) => generate::run(args, out),
        Verb::Snapshot(args) => snapshot::run(args, out),
        Verb::Learn(args) => learn::run(args, out),
        Verb::Doctor(args) => doctor::run(args, out),
    }
}

/// The daemon's last word: what it did, or why it refused.
fn finish(result: Result<String, String>, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match result {
        Ok(text) if text.is_empty() => Ok(Outcome::Done),
        Ok(text) => {
            text.lines().try_for_each(|line| writeln!(out, "{}", text::escaped(line)))?;
            Ok(Outcome::Done)
        }
        Err(text) => Ok(refused(&text)),
    }
}

/// Shows a refusal of the daemon.
fn refused(text: &str) -> Outcome {
    for line in text.lines() {
        eprintln!("usbpolicyctl: {}", text::escaped(line));
    }
    Outcome::Found
}

/// `usbpolicyctl … | head` is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
