//! Report of the doctor: a table that ends with a sentence, or JSON.

use std::collections::BTreeMap;
use std::io::Write;

use serde::Serialize;

use crate::commands::output::columns;
use crate::gpu::{Gpu, GpuUsage};

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) result: CheckOutcome,
    /// Finding of the check.
    pub(super) found: String,
    /// Advice on what to do about the finding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) todo: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum CheckOutcome {
    #[serde(rename = "ok")]
    Ok,
    /// A worker serves, but worse than it could.
    #[serde(rename = "warning")]
    Warning,
    #[serde(rename = "failed")]
    Failed,
    /// Something is missing that the given flags do not need.
    #[serde(rename = "not needed")]
    NotNeeded,
}

impl CheckOutcome {
    fn text(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::NotNeeded => "not needed",
        }
    }
}

/// A GPU with its current usage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct DeviceReport {
    #[serde(flatten)]
    pub(super) gpu: Gpu,
    #[serde(flatten)]
    pub(super) usage: GpuUsage,
}

/// Complete report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct DoctorReport {
    /// True if a worker could serve with the given flags.
    pub(super) can_serve: bool,
    /// Providers that a worker could serve on, out of those asked for.
    pub(super) providers: Vec<&'static str>,
    /// Reasons why a worker could not serve on the others, by provider.
    pub(super) obstacles: BTreeMap<&'static str, String>,
    pub(super) checks: Vec<Check>,
    pub(super) gpus: Vec<DeviceReport>,
}

impl DoctorReport {
    /// Writes the report as one JSON object.
    ///
    /// # Errors
    ///
    /// When the report cannot be written.
    pub(super) fn json(&self, out: &mut impl Write) -> anyhow::Result<()> {
        writeln!(out, "{}", serde_json::to_string(self)?)?;
        Ok(())
    }

    /// Writes the report as a table.
    ///
    /// # Errors
    ///
    /// When the report cannot be written.
    pub(super) fn table(&self, out: &mut impl Write) -> std::io::Result<()> {
        let rows = self.checks.iter().map(|check| {
            let is_urgent = matches!(check.result, CheckOutcome::Warning | CheckOutcome::Failed);
            let todo = check.todo.as_ref().filter(|_| is_urgent);
            let todo = todo.map_or_else(String::new, |todo| format!("\n→ {todo}"));
            vec![
                check.name.clone(),
                check.result.text().to_owned(),
                format!("{}{todo}", check.found),
            ]
        });
        columns(rows, |_| false, out)?;
        writeln!(out, "\n{}", self.summary())
    }

    /// Summary of the report in one sentence.
    fn summary(&self) -> String {
        let providers = match self.providers.as_slice() {
            [] => "nothing".to_owned(),
            some => some.join(", "),
        };
        let obstacles = self.obstacles.iter();
        let obstacles =
            obstacles.map(|(provider, reason)| format!("; not on {provider}: {reason}"));
        format!("can serve on: {providers}{}", obstacles.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_ends_in_a_sentence() {
        let check = |name: &str, result, found: &str, todo: Option<&str>| Check {
            name: name.to_owned(),
            result,
            found: found.to_owned(),
            todo: todo.map(str::to_owned),
        };
        let report = DoctorReport {
            can_serve: true,
            providers: vec!["cpu"],
            obstacles: BTreeMap::from([("cuda", "no driver: install one".to_owned())]),
            checks: vec![
                check("memory", CheckOutcome::Ok, "2 GiB", None),
                check("open files", CheckOutcome::Warning, "10", Some("raise it")),
                check("GPUs", CheckOutcome::NotNeeded, "none", Some("buy one")),
            ],
            gpus: Vec::new(),
        };
        let mut out = Vec::new();
        report.table(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "memory      ok          2 GiB\n\
             open files  warning     10\n                        \
             → raise it\n\
             GPUs        not needed  none\n\n\
             can serve on: cpu; not on cuda: no driver: install one\n"
        );
    }
}
