//! The program `godwit`.

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
