//! Pages of docs/ that are made from the code: the manual of flags and the table
//! of metrics.

use std::fmt::Write as _;

use imagegpt::serve::metrics::Metrics;

/// Text between two pipes of a table.
fn cell(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace('|', "\\|").replace('<', "&lt;")
}

/// One row per metric: name with its labels, kind, help.
pub(crate) fn metrics_table() -> String {
    let mut table = String::from("| metric | kind | what it is |\n|---|---|---|\n");
    for metric in Metrics::definitions() {
        let labels = match metric.labels {
            [] => String::new(),
            labels => format!("{{{}}}", labels.join(",")),
        };
        let kind = format!("{:?}", metric.kind).to_lowercase();
        let (name, help) = (metric.name, cell(metric.help));
        let _ = writeln!(table, "| `{name}{labels}` | {kind} | {help} |");
    }
    table
}

/// The manual of all commands, a section per command and a table per group of
/// flags.
pub(crate) fn flags_page(cli: &clap::Command) -> String {
    let mut page = String::from(
        "# All flags\n\nThis page is made from the code, as `imagegpt COMMAND --help` is \
         (`IMAGEGPT_SNAPSHOTS=write cargo test --test outside`).\n\
         [Command line](cli.md) says what the commands are for.\n\
         A flag with a variable may be set in the environment instead; the command line wins. \
         An empty variable counts as unset; a flag without a value takes 1, yes, on, true, 0, no, \
         off or false.\n\
         Times are written like `500ms`, `30s` or `1h`, sizes like `512KiB` or `2GiB`.\n",
    );
    for command in cli
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
    {
        describe(command, cli.get_name(), &mut page);
    }
    page
}

fn describe(command: &clap::Command, above: &str, page: &mut String) {
    let path = format!("{above} {}", command.get_name());
    let about = command.get_long_about().or_else(|| command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    let depth = "#".repeat(path.split(' ').count());
    let _ = write!(page, "\n{depth} {path}\n\n{}\n", prose(&about));
    let mut headings: Vec<Option<&str>> = Vec::new();
    let shown: Vec<&clap::Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && arg.get_id() != "help" && arg.get_id() != "version")
        .collect();
    for arg in &shown {
        if !headings.contains(&arg.get_help_heading()) {
            headings.push(arg.get_help_heading());
        }
    }
    for heading in headings {
        let title = heading.unwrap_or("Arguments and flags");
        let _ = write!(
            page,
            "\n**{title}**\n\n| flag | variable | default | what it does |\n|---|---|---|---|\n"
        );
        for arg in shown.iter().filter(|arg| arg.get_help_heading() == heading) {
            let _ = writeln!(page, "{}", row(arg));
        }
    }
    for below in command
        .get_subcommands()
        .filter(|below| below.get_name() != "help")
    {
        describe(below, &path, page);
    }
}

/// Paragraphs of a help text.
fn prose(text: &str) -> String {
    let paragraphs = text.split("\n\n").map(|text| {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        text.replace('<', "&lt;")
    });
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

fn row(arg: &clap::Arg) -> String {
    let values = arg.get_value_names().unwrap_or_default().join(" ");
    let takes_value = arg.get_action().takes_values();
    let name = match (arg.get_long(), takes_value) {
        (Some(long), true) => format!("--{long} {values}"),
        (Some(long), false) => format!("--{long}"),
        (None, _) => values,
    };
    let short = arg
        .get_short()
        .map_or(String::new(), |short| format!("`-{short}`, "));
    let variable = arg.get_env().map_or(String::new(), |name| {
        format!("`{}`", name.to_string_lossy())
    });
    let defaults: Vec<_> = arg
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy())
        .collect();
    let default = match (defaults.join(","), takes_value) {
        (value, true) if !value.is_empty() => format!("`{value}`"),
        (_, true) if arg.is_required_set() => "required".to_owned(),
        _ => String::new(),
    };
    let help = arg.get_long_help().or_else(|| arg.get_help());
    let mut help = cell(&help.map(ToString::to_string).unwrap_or_default());
    let choices: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| takes_value && !value.is_hide_set())
        .map(|value| match value.get_help() {
            Some(text) => format!("`{}`: {}", value.get_name(), cell(&text.to_string())),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !choices.is_empty() {
        let _ = write!(help, ". Values: {}", choices.join("; "));
    }
    format!("| {short}`{name}` | {variable} | {default} | {help} |")
}
