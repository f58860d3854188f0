use crate::world::{World, node};
use gnttab_xenstore::Errno::{E2BIG, EINVAL, ENOENT};
use gnttab_xenstore::wire::{Reply, Request};

#[test]
fn write_creates_all_that_is_missing_above() {
    let mut w = World::new();
    w.write(w.dom0, "/a/b/c", "v").unwrap();
    assert_eq!(w.read(w.dom0, "/a/b/c").unwrap(), "v");
    assert_eq!(w.read(w.dom0, "/a/b").unwrap(), "");
    assert_eq!(w.ls(w.dom0, "/").unwrap(), ["a"]);
    assert_eq!(w.ls(w.dom0, "/a/b").unwrap(), ["c"]);
}

#[test]
fn mkdir_leaves_what_is_there() {
    let mut w = World::new();
    w.write(w.dom0, "/a", "v").unwrap();
    w.mkdir(w.dom0, "/a").unwrap();
    assert_eq!(w.read(w.dom0, "/a").unwrap(), "v");
    w.mkdir(w.dom0, "/x/y").unwrap();
    assert_eq!(w.read(w.dom0, "/x/y").unwrap(), "");
}

#[test]
fn rm_takes_all_below_and_forgives_what_is_not_there() {
    let mut w = World::new();
    w.write(w.dom0, "/a/b/c", "v").unwrap();
    w.rm(w.dom0, "/a/b").unwrap();
    assert_eq!(w.read(w.dom0, "/a/b/c"), Err(ENOENT));
    assert_eq!(w.read(w.dom0, "/a").unwrap(), "");
    w.rm(w.dom0, "/a/b").unwrap();
    assert_eq!(w.rm(w.dom0, "/a/b/c"), Err(ENOENT), "its parent is missing too");
    assert_eq!(w.rm(w.dom0, "/"), Err(EINVAL));
}

#[test]
fn values_are_any_bytes() {
    let mut w = World::new();
    let value: Vec<u8> = (0..=255).collect();
    let write = Request::Write {
        path: node("/a"),
        value: value.clone().into(),
    };
    w.done(w.dom0, &write).unwrap();
    assert_eq!(
        w.ask(w.dom0, &Request::Read(node("/a"))),
        Ok(Reply::Value(value.into()))
    );
}

#[test]
fn relative_paths_are_the_senders_own() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.write(g5, "name", "five").unwrap();
    assert_eq!(w.read(w.dom0, "/local/domain/5/name").unwrap(), "five");
    w.write(w.dom0, "name", "zero").unwrap();
    assert_eq!(w.read(w.dom0, "/local/domain/0/name").unwrap(), "zero");
}

fn part(w: &mut World, offset: usize) -> Result<(u64, Vec<String>, bool), gnttab_xenstore::Errno> {
    let offset = u32::try_from(offset).unwrap();
    match w.ask(
        w.dom0,
        &Request::DirectoryPart {
            path: node("/d"),
            offset,
        },
    )? {
        Reply::Part {
            generation,
            names,
            last,
        } => Ok((generation, names.iter().map(ToString::to_string).collect(), last)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_list_too_long_for_a_message_comes_in_parts() {
    let mut w = World::new();
    let names: Vec<_> = (0..1000).map(|i| format!("name-{i:04}")).collect();
    for name in &names {
        w.mkdir(w.dom0, &format!("/d/{name}")).unwrap();
    }
    assert_eq!(w.ls(w.dom0, "/d"), Err(E2BIG));

    let (mut all, mut offset) = (Vec::new(), 0);
    loop {
        let (_, names, last) = part(&mut w, offset).unwrap();
        offset += names.iter().map(|name| name.len() + 1).sum::<usize>();
        all.extend(names);
        if last {
            break;
        }
    }
    assert_eq!(all, names);
    assert_eq!(
        part(&mut w, offset).unwrap().1,
        [""; 0],
        "at the end there is nothing more"
    );
    assert_eq!(part(&mut w, offset + 1), Err(EINVAL), "past the end");
    assert_eq!(part(&mut w, 5), Err(EINVAL), "amid a name");
}

#[test]
fn the_generation_of_a_list_changes_with_the_list_alone() {
    let mut w = World::new();
    w.mkdir(w.dom0, "/d/x").unwrap();
    let first = part(&mut w, 0).unwrap().0;
    w.write(w.dom0, "/d", "value").unwrap();
    w.write(w.dom0, "/d/x", "value").unwrap();
    assert_eq!(part(&mut w, 0).unwrap().0, first);
    w.mkdir(w.dom0, "/d/y").unwrap();
    let second = part(&mut w, 0).unwrap().0;
    assert_ne!(second, first);
    w.rm(w.dom0, "/d/y").unwrap();
    assert_ne!(part(&mut w, 0).unwrap().0, second);
}
