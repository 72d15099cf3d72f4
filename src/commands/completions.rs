//! Completions for shells, and manual pages, from the definitions of the flags.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;

use super::cli::Cli;

/// Name of the program in completions and manual pages.
const PROGRAM: &str = "imagegpt";

/// Arguments of `imagegpt completions`.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// Shell that reads the script
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Arguments of `imagegpt man`.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Directory into which the pages are written, such as
    /// ~/.local/share/man/man1; made if it does not exist
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

/// Prints the completions for a shell.
///
/// # Errors
///
/// When standard output cannot be written.
pub fn run(args: &CompletionsArgs, out: &mut impl Write) -> anyhow::Result<()> {
    // The generator ends the process if it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), PROGRAM, &mut script);
    out.write_all(&script)?;
    Ok(())
}

/// Writes the manual pages, and prints their paths.
///
/// # Errors
///
/// When the directory or a page cannot be written.
pub fn man(args: &ManArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let folder = &args.output;
    std::fs::create_dir_all(folder)
        .with_context(|| format!("--output {} cannot be made", folder.display()))?;
    let mut command = Cli::command();
    command.build();
    for (name, page) in pages(&command)? {
        let path = folder.join(format!("{name}.1"));
        std::fs::write(&path, page)
            .with_context(|| format!("{} cannot be written", path.display()))?;
        writeln!(out, "{}", path.display())?;
    }
    Ok(())
}

/// Renders the page of a command and those of its own commands.
fn pages(command: &Command) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
        .to_owned();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    let mut all = vec![(name, page)];
    for command in command.get_subcommands() {
        // Help is an option of every command.
        if command.get_name() != "help" && !command.is_hide_set() {
            all.extend(pages(command)?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_has_completions_of_commands_flags_and_values() {
        for &shell in Shell::value_variants() {
            let mut script = Vec::new();
            run(&CompletionsArgs { shell }, &mut script).unwrap();
            let script = String::from_utf8(script).unwrap();
            for word in ["serve", "feature-layer", "retry-errors", "doctor"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
            // PowerShell and Elvish complete no values.
            if matches!(shell, Shell::Bash | Shell::Zsh | Shell::Fish) {
                assert!(script.contains("center-crop"), "{shell}");
            }
        }
    }

    #[test]
    fn every_command_has_a_manual_page_with_its_flags() {
        let folder = tempfile::tempdir().unwrap();
        let args = ManArgs {
            output: folder.path().join("man1"),
        };
        let mut printed = Vec::new();
        man(&args, &mut printed).unwrap();
        let paths = String::from_utf8(printed).unwrap();
        let page = |name: &str| std::fs::read_to_string(args.output.join(name)).unwrap();
        assert!(paths.contains("imagegpt-bench-load.1"), "{paths}");
        assert!(page("imagegpt.1").contains("imagegpt\\-serve(1)"));
        let serve = page("imagegpt-serve.1");
        assert!(serve.contains("\\-\\-feature\\-layer"));
        assert!(serve.contains("IMAGEGPT_FEATURE_LAYER"));
        assert!(!paths.contains("help"), "{paths}");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let args = ManArgs {
            output: file.path().join("man1"),
        };
        let error = man(&args, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("--output"), "{error}");
    }
}
