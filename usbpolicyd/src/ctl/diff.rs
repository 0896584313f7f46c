//! `usbpolicyctl diff` and `plan`: what another policy would decide.

use std::io::Write;
use std::path::PathBuf;

use common::ids::VmName;
use serde::Serialize;

use super::host::{Devices, Host, MaybeLive, compiled, title};
use super::text::{WIDTH, escaped, wrapped};
use super::{Outcome, check};
use crate::facts::DeviceFacts;
use crate::policy::compile::CompiledPolicy;
use crate::policy::decide::{Verdict, decide};
use crate::policy::explain::sentence;

/// Compare what two policies decide about each device
///
/// Exit status: 0 all the same, 1 something changes, 2 a policy or the snapshot cannot be used.
#[derive(Debug, clap::Args)]
pub(super) struct DiffArgs {
    /// The old policy: file or directory
    old: PathBuf,
    /// The new policy: file or directory
    new: PathBuf,
    #[command(flatten)]
    devices: Devices,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show what a reload would do with each device, without doing it
///
/// Without a running daemon nobody is known to hold a device, and each is shown as if it were plugged in now.
///
/// Exit status: 0 shown, 1 there are conflicts, 2 the policy or the snapshot cannot be used.
#[derive(Debug, clap::Args)]
pub(super) struct PlanArgs {
    /// Use this policy (file or directory), not the installed one
    #[arg(long, value_name = "FILE")]
    policy: Vec<PathBuf>,
    #[command(flatten)]
    host: MaybeLive,
    /// Hubs and devices that stay with the host, too
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One device in a plan or a comparison.
#[derive(Debug, Serialize)]
struct Line {
    device: String,
    connector: String,
    id: String,
    #[serde(skip)]
    title: String,
    #[serde(skip)]
    is_hub: bool,
    /// Before; only in a comparison.
    #[serde(skip_serializing_if = "Option::is_none")]
    old: Option<Verdict>,
    new: Verdict,
    /// What would happen; only in a plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<Action>,
    /// Who has it now.
    #[serde(skip_serializing_if = "Option::is_none")]
    holder: Option<VmName>,
}

/// What would happen to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Action {
    /// A VM gets it from the host.
    Attach,
    /// Its VM keeps it.
    Keep,
    /// Another VM gets it.
    Move,
    /// Its VM loses it.
    Detach,
    /// It stays with the host.
    Nothing,
}

impl Action {
    fn of(holder: Option<&VmName>, verdict: &Verdict) -> Self {
        match (holder, verdict) {
            (None, Verdict::Assign { .. }) => Self::Attach,
            (Some(holder), Verdict::Assign { vm, .. }) if vm == holder => Self::Keep,
            (Some(_), Verdict::Assign { .. }) => Self::Move,
            (Some(_), _) => Self::Detach,
            (None, _) => Self::Nothing,
        }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'l> {
    schema: &'static str,
    devices: &'l [Line],
}

pub(super) fn diff(args: &DiffArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let snapshot = args.devices.read()?;
    let read = |path: &PathBuf| compiled(&check::sources(std::slice::from_ref(path))?, &snapshot.topology);
    let (old, new) = (read(&args.old)?, read(&args.new)?);
    let host = Host::from(snapshot);
    let mut lines = lines(&host, Some(&old), &new);
    lines.retain(|line| line.old.as_ref().is_some_and(|old| changed(old, &line.new)));
    if args.json {
        json("usbpolicyctl-diff/1", &lines, out)?;
    } else if lines.is_empty() {
        writeln!(out, "{} devices, all as before", host.snapshot.devices.len())?;
    } else {
        for line in &lines {
            heading(line, out)?;
            let old = line.old.as_ref().map(sentence).unwrap_or_default();
            entry("- ", &old, out)?;
            entry("+ ", &sentence(&line.new), out)?;
        }
    }
    Ok(if lines.is_empty() { Outcome::Done } else { Outcome::Found })
}

pub(super) fn plan(args: &PlanArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let host = args.host.read()?;
    let policy = compiled(&check::sources(&args.policy)?, &host.snapshot.topology)?;
    let mut lines = lines(&host, None, &policy);
    let conflict = lines.iter().any(|line| matches!(line.new, Verdict::Conflict { .. }));
    let total = lines.len();
    lines.retain(|line| {
        args.all || line.holder.is_some() || !(line.is_hub || matches!(line.new, Verdict::Host))
    });
    if args.json {
        json("usbpolicyctl-plan/1", &lines, out)?;
    } else {
        for line in &lines {
            heading(line, out)?;
            let now = match (line.action, &line.holder) {
                (Some(Action::Keep), _) => "no change: ".to_owned(),
                (Some(Action::Move), Some(holder)) => format!("MOVES from {holder}: "),
                (Some(Action::Detach), Some(holder)) => format!("LEAVES {holder}: "),
                _ => String::new(),
            };
            entry("", &(now + &sentence(&line.new)), out)?;
        }
        let rest = total - lines.len();
        if rest > 0 {
            writeln!(out, "{rest} more stay with the host: hubs, or no rule names them (--all shows them)")?;
        }
    }
    Ok(if conflict { Outcome::Found } else { Outcome::Done })
}

fn lines(host: &Host, old: Option<&CompiledPolicy>, new: &CompiledPolicy) -> Vec<Line> {
    let line = |device: &DeviceFacts| {
        let context = host.context(device);
        let verdict = decide(new, device, &context);
        Line {
            device: device.sys_name.clone(),
            connector: device.connector.to_string(),
            id: device.id.to_string(),
            title: title(device),
            is_hub: device.is_hub(),
            old: old.map(|old| decide(old, device, &context)),
            action: old.is_none().then(|| Action::of(context.holder.as_ref(), &verdict)),
            holder: context.holder,
            new: verdict,
        }
    };
    host.snapshot.devices.iter().map(line).collect()
}

/// Whether something else happens. Another rule with the same result is no change.
fn changed(old: &Verdict, new: &Verdict) -> bool {
    match (old, new) {
        (Verdict::Assign { vm: a, options: old, .. }, Verdict::Assign { vm: b, options: new, .. }) => {
            a != b || old != new
        }
        (Verdict::Denied { .. }, Verdict::Denied { .. }) => false,
        (Verdict::Manual { vms: a, .. }, Verdict::Manual { vms: b, .. })
        | (Verdict::Conflict { vms: a, .. }, Verdict::Conflict { vms: b, .. }) => a != b,
        (old, new) => old != new,
    }
}

fn json(schema: &'static str, lines: &[Line], out: &mut dyn Write) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &Report { schema, devices: lines })?;
    Ok(writeln!(out)?)
}

fn heading(line: &Line, out: &mut dyn Write) -> anyhow::Result<()> {
    for text in wrapped(&format!("{}  {}", line.device, line.title), WIDTH) {
        writeln!(out, "{text}")?;
    }
    Ok(())
}

fn entry(sign: &str, text: &str, out: &mut dyn Write) -> anyhow::Result<()> {
    for (index, part) in wrapped(&escaped(text), WIDTH - 8).iter().enumerate() {
        let sign = if index == 0 { sign.to_owned() } else { " ".repeat(sign.len()) };
        writeln!(out, "    {sign}{part}")?;
    }
    Ok(())
}
