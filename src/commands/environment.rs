//! Variables of the environment that are named like the program's and are none,
//! so that a mistyped one is not ignored in silence.

use std::collections::BTreeSet;
use std::fmt;

use clap::{Command, CommandFactory as _};

use super::cli::Cli;
use super::output::complain;
use crate::files::printable;
use crate::nearest::nearest_name;

/// Beginning of the names of the program's variables.
const PREFIX: &str = "IMAGEGPT_";
/// Variables of the project that no flag has: of the Python client, of tests and
/// of scripts.
const OTHERS: [&str; 6] = [
    "IMAGEGPT_BINARY",
    "IMAGEGPT_FUZZ_SECONDS",
    "IMAGEGPT_FUZZ_SEED",
    "IMAGEGPT_MODELS",
    "IMAGEGPT_SNAPSHOTS",
    "IMAGEGPT_WHEEL",
];

/// Variable that is set and that nothing reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownVariable {
    pub name: String,
    /// Variable of the program that is most like it, if there is one.
    pub nearest: Option<String>,
}

impl fmt::Display for UnknownVariable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = printable(&self.name);
        write!(formatter, "{name} has no effect: no variable is named so")?;
        match &self.nearest {
            Some(nearest) => write!(formatter, "; {nearest} is"),
            None => Ok(()),
        }
    }
}

impl UnknownVariable {
    /// Finds the variables among `set` that begin like the program's and that
    /// nothing reads. Those that Kubernetes sets for a service whose name begins
    /// with imagegpt are not the user's.
    pub fn among(set: impl IntoIterator<Item = String>) -> Vec<Self> {
        let set: BTreeSet<String> = set
            .into_iter()
            .filter(|name| name.starts_with(PREFIX))
            .collect();
        if set.is_empty() {
            return Vec::new();
        }
        let mut known = BTreeSet::new();
        add_variables(&Cli::command(), &mut known);
        let is_known = |name: &str| known.contains(name) || OTHERS.contains(&name);
        let unknown = set
            .iter()
            .filter(|name| !is_known(name) && !is_of_service(name, &set));
        let nearest = |name: &str| {
            let rests = known.iter().filter_map(|name| name.strip_prefix(PREFIX));
            nearest_name(&name[PREFIX.len()..], rests).map(|rest| format!("{PREFIX}{rest}"))
        };
        unknown
            .map(|name| Self {
                name: name.clone(),
                nearest: nearest(name),
            })
            .collect()
    }

    /// Finds those of the process. A variable that is empty is as good as none.
    fn of_process() -> Vec<Self> {
        let set = std::env::vars_os().filter(|(_, value)| !value.is_empty());
        Self::among(set.filter_map(|(name, _)| name.into_string().ok()))
    }
}

/// Adds the variables of a command's flags and of those of its own commands.
fn add_variables(command: &Command, known: &mut BTreeSet<String>) {
    let names = command.get_arguments().filter_map(clap::Arg::get_env);
    known.extend(names.map(|name| name.to_string_lossy().into_owned()));
    for command in command.get_subcommands() {
        add_variables(command, known);
    }
}

/// Returns true if a variable is one of those that Kubernetes sets for each
/// service of the namespace (NAME_SERVICE_HOST, NAME_SERVICE_PORT_GRPC, NAME_PORT
/// and NAME_PORT_50051_TCP), as the first of them shows.
fn is_of_service(name: &str, set: &BTreeSet<String>) -> bool {
    set.iter()
        .filter_map(|host| host.strip_suffix("_SERVICE_HOST"))
        .filter_map(|service| name.strip_prefix(service))
        .any(|rest| rest == "_PORT" || rest.starts_with("_SERVICE_") || rest.starts_with("_PORT_"))
}

/// Logs a warning for each unknown variable, for commands with a log.
pub fn log_unknown_variables() {
    for variable in UnknownVariable::of_process() {
        tracing::warn!(
            variable = %printable(&variable.name),
            nearest = variable.nearest,
            "a variable of the environment has no effect: none is named so"
        );
    }
}

/// Prints a warning for each unknown variable to standard error.
pub fn print_unknown_variables() {
    for variable in UnknownVariable::of_process() {
        complain(&format!("warning: {variable}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Vec<String> {
        let unknown = UnknownVariable::among(names.iter().map(|&name| name.to_owned()));
        unknown.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn mistyped_variables_are_named_with_the_nearest() {
        assert_eq!(
            found(&["IMAGEGPT_MAX_BATCHSIZE", "IMAGEGPT_LISTEN", "PATH"]),
            [
                "IMAGEGPT_MAX_BATCHSIZE has no effect: no variable is named so; \
              IMAGEGPT_MAX_BATCH_SIZE is"
            ]
        );
        assert_eq!(
            found(&["IMAGEGPT_QUUX", "IMAGEGPT_", "imagegpt_listen"]),
            [
                "IMAGEGPT_ has no effect: no variable is named so",
                "IMAGEGPT_QUUX has no effect: no variable is named so"
            ]
        );
        // Of a command that is not this one.
        assert_eq!(found(&["IMAGEGPT_SHARDS", "IMAGEGPT_BINARY"]), [""; 0]);
    }

    #[test]
    fn variables_of_services_are_nobodys_mistake() {
        let services = [
            "IMAGEGPT_SERVICE_HOST",
            "IMAGEGPT_SERVICE_PORT",
            "IMAGEGPT_SERVICE_PORT_GRPC",
            "IMAGEGPT_PORT",
            "IMAGEGPT_PORT_50051_TCP_ADDR",
            "IMAGEGPT_HEADLESS_SERVICE_HOST",
            "IMAGEGPT_HEADLESS_PORT_50051_TCP",
        ];
        assert_eq!(found(&services), [""; 0]);
        assert_eq!(found(&["IMAGEGPT_PORT"]).len(), 1);
        assert_eq!(
            found(&["IMAGEGPT_SERVICE_HOST", "IMAGEGPT_LISTNE"]).len(),
            1
        );
    }
}
