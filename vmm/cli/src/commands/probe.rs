//! `probe`: what this host offers for booting and moving guests, as a table or as JSON.

use output::print;
use vmm::cpu::Template;
use vmm::probe::{Findings, findings};

use super::client::json_line;
use crate::Exit;
use crate::args::ListArgs;

pub(super) fn run(args: &ListArgs) -> anyhow::Result<Exit> {
    let findings = findings();
    print(&if args.json {
        json_line(&findings)?
    } else {
        table(&findings)
    });
    Ok(if findings.boot { Exit::Done } else { Exit::Failed })
}

fn table(findings: &Findings) -> String {
    let (template, reason) = Template::probe();
    let verdict = |yes: bool| if yes { "yes" } else { "no, see what it LACKS below" };
    let mut table = format!(
        "boots guests:   {}\nmoves guests:   {}\npost-copy:      {}\nCPU template:   {template} ({reason})\n",
        verdict(findings.boot),
        verdict(findings.migration),
        verdict(findings.postcopy)
    );
    for check in &findings.checks {
        let mark = match (check.present, check.required) {
            (true, _) => "has  ",
            (false, true) => "LACKS",
            (false, false) => "lacks",
        };
        table += &format!(
            "  {mark} {:<18} {:<10} {}\n",
            check.name, check.purpose, check.detail
        );
    }
    table
}
