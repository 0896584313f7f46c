//! `usbpolicyctl explain`: why a device goes where it goes.

use std::io::Write;
use std::path::PathBuf;

use super::host::{MaybeLive, compiled, find, title};
use super::text::{WIDTH, escaped, wrapped};
use super::{Outcome, check};
use crate::facts::HostUseLevel;
use crate::policy::decide::Order;
use crate::policy::explain::{ClauseTrace, Explanation, RuleTrace, explain, sentence};

/// Columns of the first column.
const LEFT: usize = 11;

/// Rules of one kind that are shown without `--all`.
const RULES_SHOWN: usize = 12;

/// Explain the decision about one device: each guard, each rule, each key
///
/// DEVICE is a kernel name (3-9.1), bus:device as lsusb prints it (003:014), a port (pci-0000:00:14.0/usb2:9.1), the
/// name of a connector, or vendor:product if there is one of it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Which device
    device: String,
    /// Use this policy (file or directory), not the installed one
    #[arg(long, value_name = "FILE")]
    policy: Vec<PathBuf>,
    #[command(flatten)]
    host: MaybeLive,
    /// Only rules for this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Show all rules, with all keys
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let host = args.host.read()?;
    let policy = compiled(&check::sources(&args.policy)?, &host.snapshot.topology)?;
    let device = find(&host.snapshot, &policy, &args.device)?;
    let mut explanation = explain(&policy, device, &host.context(device));
    if let Some(vm) = &args.vm {
        explanation.assign.retain(|rule| rule.vms.iter().any(|one| one.as_str() == vm));
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &explanation)?;
        writeln!(out)?;
    } else {
        out.write_all(human(&explanation, args.all).as_bytes())?;
    }
    Ok(Outcome::Done)
}

/// The explanation in 80 columns. All strings of the device are escaped.
pub(super) fn human(it: &Explanation, all: bool) -> String {
    let mut text = heading(it);
    row(&mut text, "guards", &guards(it));
    for used in &it.host_use {
        let level = if used.level == HostUseLevel::Protected { "protected" } else { "busy" };
        row(&mut text, "", &format!("{level}: {}", escaped(&used.why)));
    }
    rules(&mut text, "deny", &it.deny, all);
    for vm in &it.vm_deny {
        row(&mut text, "", &format!("VM {vm} denies it itself (vms.{vm}.deny)"));
    }
    match &it.order {
        Some(Order::Attach { vm, actor }) => {
            row(&mut text, "order", &format!("to {vm}, by {}", escaped(actor)))
        }
        Some(Order::Keep { actor }) => row(&mut text, "order", &format!("to nobody, by {}", escaped(actor))),
        None => {}
    }
    rules(&mut text, "assign", &it.assign, all);
    if let Some(settled) = &it.settled {
        row(&mut text, "settled", settled);
    }
    row(&mut text, "decision", &escaped(&sentence(&it.decision)));
    text
}

fn heading(it: &Explanation) -> String {
    let device = &it.device;
    let mut text = String::new();
    for (index, line) in wrapped(&format!("{}  {}", device.sys_name, title(device)), WIDTH).iter().enumerate()
    {
        text.push_str(if index == 0 { "" } else { "  " });
        text.push_str(line);
        text.push('\n');
    }
    if let Some(serial) = &device.serial {
        row(&mut text, "serial", &escaped(serial));
    }
    let halves: Vec<String> = device.connector.halves.iter().map(ToString::to_string).collect();
    let name = it.connector_name.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
    row(&mut text, "connector", &format!("{name}{}", halves.join(" = ")));
    let mut classes: Vec<String> = device.interfaces.iter().map(|one| one.class.to_string()).collect();
    classes.sort();
    classes.dedup();
    let classes = if classes.is_empty() { "none".to_owned() } else { classes.join(", ") };
    row(&mut text, "interfaces", &classes);
    text
}

fn guards(it: &Explanation) -> String {
    let word = |holds| if holds { "YES" } else { "no" };
    let all: Vec<String> = it.guards.iter().map(|one| format!("{} {}", one.guard, word(one.holds))).collect();
    all.join(" · ")
}

fn rules(text: &mut String, kind: &str, rules: &[RuleTrace], all: bool) {
    if rules.is_empty() {
        row(text, kind, "no rule");
        return;
    }
    let shown =
        if all { rules.len() } else { RULES_SHOWN.max(rules.iter().filter(|rule| rule.matches).count()) };
    let name_width =
        rules.iter().take(shown).map(|rule| rule.rule.chars().count()).max().unwrap_or(0).min(24);
    for (index, rule) in rules.iter().take(shown).enumerate() {
        let head = format!("{:name_width$}  {}  ", rule.rule, if rule.matches { "YES" } else { "no " });
        let indent = head.chars().count();
        let lines = wrapped(&detail(rule), WIDTH.saturating_sub(LEFT + indent).max(20));
        for (number, line) in lines.iter().enumerate() {
            let left = if index == 0 && number == 0 { kind } else { "" };
            let head = if number == 0 { head.clone() } else { " ".repeat(indent) };
            text.push_str(format!("{left:LEFT$}{head}{line}").trim_end());
            text.push('\n');
        }
        if all {
            rule.clauses.iter().for_each(|clause| keys(text, clause, "  "));
        }
    }
    if rules.len() > shown {
        row(text, "", &format!("and {} that do not match (--all shows them)", rules.len() - shown));
    }
}

/// What is said of a rule behind its name.
fn detail(rule: &RuleTrace) -> String {
    if !rule.matches {
        return rule.why_not().map(|why| escaped(&why)).unwrap_or_default();
    }
    let Some((priority, specificity)) = rule.priority.zip(rule.specificity) else {
        return rule.reason.clone().map(|reason| escaped(&reason)).unwrap_or_default();
    };
    let vms = rule.vms.iter().map(|vm| vm.as_str()).collect::<Vec<_>>().join(", ");
    let mode = rule.mode.map(|mode| format!(", mode {mode}")).unwrap_or_default();
    let priority = if priority == 0 { String::new() } else { format!("priority {priority}, ") };
    format!("{vms}, {priority}specificity {specificity}{mode}")
}

/// The keys of one way to match, one line each.
fn keys(text: &mut String, clause: &ClauseTrace, indent: &str) {
    if !clause.stands_for.is_empty() {
        row(text, "", &format!("{indent}as device {}:", clause.stands_for));
    }
    for key in &clause.keys {
        let sign = if key.fits { "+" } else { "-" };
        let line =
            format!("{sign} {}: {} (asked for: {})", key.key, escaped(&key.found), escaped(&key.wanted));
        for (number, line) in wrapped(&line, WIDTH - LEFT - indent.len() - 2).iter().enumerate() {
            let hang = if number == 0 { "" } else { "  " };
            text.push_str(&format!("{:LEFT$}{indent}{hang}{line}\n", ""));
        }
    }
    for not in &clause.not {
        row(text, "", &format!("{indent}unless all of:"));
        keys(text, not, &format!("{indent}  "));
    }
}

fn row(text: &mut String, left: &str, right: &str) {
    for (index, line) in wrapped(right, WIDTH - LEFT).iter().enumerate() {
        let left = if index == 0 { left } else { "" };
        text.push_str(format!("{left:LEFT$}{line}").trim_end());
        text.push('\n');
    }
}
