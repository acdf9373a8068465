"""Download one source archive without running its set-up code.

`pip download` would build the package to read its metadata. Here pip only says where the file is and
moves the bytes, with its own index, proxy and certificate settings.

Arguments: name, version, folder.
"""
import os
import sys

name, version, folder = sys.argv[1:]
try:
    from pip._internal.commands import create_command
    from pip._internal.models.target_python import TargetPython
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--no-binary=:all:", "--no-cache-dir", "--quiet"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(
            options=options, session=session, target_python=TargetPython(), ignore_requires_python=True
        )
        best = finder.find_best_candidate(name, SpecifierSet("==" + version)).best_candidate
        if best is None:
            sys.exit(f"ERROR: the index has no source archive of {name}=={version}")
        # Without this header a server may send the archive with a second layer of compression.
        response = session.get(best.link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
        response.raise_for_status()
        with open(os.path.join(folder, os.path.basename(best.link.filename)), "wb") as out:
            for chunk in response.iter_content(1 << 20):
                out.write(chunk)
except (ImportError, AttributeError, TypeError) as error:
    sys.exit(f"ERROR: this pip cannot locate a source archive ({error}); upgrade it: {sys.executable} -m pip install -U pip")
except Exception as error:
    sys.exit(f"ERROR: {error}")
