//! `usbpolicyctl check`: whether a policy can be used, and whether it says what was probably meant.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::host::{Devices, this_host};
use super::{Outcome, text};
use crate::policy::lint::lint;
use crate::policy::load::{Layer, Source, load};
use crate::policy::problem::{Problem, Severity, quote};
use crate::policy_files::{Places, read_path};

/// Check a policy: syntax, names, claims that can tie, rules that never win
///
/// Without FILE, checks the installed policy: /usr/lib/usbpolicyd/policy.d, /etc/usbpolicyd/policy.toml and
/// /etc/usbpolicyd/policy.d. Needs no running daemon and no rights.
///
/// Exit status: 0 nothing found (notes do not count), 1 warnings, 2 the policy cannot be used.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Files or directories of *.toml, later ones over earlier ones
    files: Vec<PathBuf>,
    #[command(flatten)]
    devices: Devices,
    /// Also look whether the ports exist on this host (always so without FILE)
    #[arg(long, conflicts_with = "devices")]
    this_host: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Treat notes as warnings
    #[arg(long)]
    strict: bool,
}

/// What `check --json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    usable: bool,
    problems: &'a [Problem],
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let sources = sources(&args.files)?;
    let snapshot = match () {
        () if args.this_host || args.devices.is_given() => Some(args.devices.read()?),
        () if args.files.is_empty() => this_host().ok(),
        () => None,
    };
    let (usable, mut problems) = match load(&sources) {
        Ok(loaded) => {
            let found = lint(&loaded.policy, snapshot.as_ref().map(|snapshot| &snapshot.topology));
            (true, loaded.notes.into_iter().chain(found).collect())
        }
        Err(problems) => (false, problems),
    };
    quote(&mut problems, &sources);
    let counts = |wanted: Severity| problems.iter().filter(|problem| problem.severity == wanted).count();
    let (warnings, notes) = (counts(Severity::Warning), counts(Severity::Note));
    if args.json {
        serde_json::to_writer_pretty(
            &mut *out,
            &Report { schema: "usbpolicyctl-check/1", usable, problems: &problems },
        )?;
        writeln!(out)?;
    } else {
        for problem in &problems {
            writeln!(out, "{}", text::problem(problem, text::colour()))?;
        }
        writeln!(out, "{}", summary(&sources, counts(Severity::Error), warnings, notes))?;
    }
    Ok(match () {
        () if !usable => Outcome::Unusable,
        () if warnings > 0 || (args.strict && notes > 0) => Outcome::Found,
        () => Outcome::Done,
    })
}

/// The files that were named, or those that the daemon would read.
pub(super) fn sources(files: &[PathBuf]) -> anyhow::Result<Vec<Source>> {
    if files.is_empty() {
        return Ok(Places::default().read()?);
    }
    let mut sources = Vec::new();
    for file in files {
        sources.extend(read_path(file, Layer::Main)?);
    }
    Ok(sources)
}

fn summary(sources: &[Source], errors: usize, warnings: usize, notes: usize) -> String {
    let count = |number: usize, what: &str| match number {
        0 => None,
        1 => Some(format!("1 {what}")),
        _ => Some(format!("{number} {what}s")),
    };
    let found: Vec<String> = [count(errors, "error"), count(warnings, "warning"), count(notes, "note")]
        .into_iter()
        .flatten()
        .collect();
    let files = count(sources.len(), "file").unwrap_or_else(|| "no file".to_owned());
    if found.is_empty() { format!("{files}: all well") } else { format!("{files}: {}", found.join(", ")) }
}
