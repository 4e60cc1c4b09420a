#!/usr/bin/env python3
"""move.py ROOT name [name...]: split source notebooks nbs/NAME.ipynb into the rooms of PLAN, with imports, setup, links."""
import ast, builtins, hashlib, json, re, sys, os
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from plan import PLAN, EXTRA, WHERE, PLAIN
ROOT = Path(sys.argv[1]); NAMES = sys.argv[2:]
MOVES = json.load(open('../shared/house-moves.json'))
P = 'pc_transformer/'
mod = lambda path: path.removeprefix(P).removesuffix('.py').replace('/', '.')
STD = sys.stdlib_module_names

def text(c): return ''.join(c['source'])
def nid(*a): return hashlib.sha1('|'.join(map(str, a)).encode()).hexdigest()[:8]
def code(src, *a): return {'cell_type': 'code', 'execution_count': None, 'id': nid(src, *a), 'metadata': {}, 'outputs': [], 'source': src.splitlines(True)}
def md(src, *a): return {'cell_type': 'markdown', 'id': nid(src, *a), 'metadata': {}, 'source': src.splitlines(True)}
def exported(c): return c['cell_type'] == 'code' and re.search(r'^#\|\s*export', text(c), re.M)
def plain(src): return '\n'.join(('' if l.startswith(('%', '!', '#|')) else l) for l in src.splitlines())

# ---- where every definition goes
target_of = {}      # (old module, name) -> new module
rest = {}           # old module -> new module of what is not named
for s, v in MOVES['split'].items():
    for t, names in v.items():
        for n in names: target_of[mod(s), n] = mod(t)
for s, v in MOVES['move'].items(): rest[mod(s)] = mod(v)
for (s, n), t in EXTRA.items(): target_of[s, n] = t
def where(old, name):
    t = target_of.get((old, name)) or rest.get(old, old)
    return t

def bound(node):
    "Names that a statement binds at top level."
    out = set()
    for n in ([node] if not isinstance(node, (ast.If, ast.Try, ast.For, ast.With, ast.While)) else ast.walk(node)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)): out.add(n.name)
        elif isinstance(n, ast.Import): out |= {(a.asname or a.name.split('.')[0]) for a in n.names}
        elif isinstance(n, ast.ImportFrom): out |= {(a.asname or a.name) for a in n.names}
        elif isinstance(n, ast.Assign):
            for t in n.targets: out |= {x.id for x in ast.walk(t) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        elif isinstance(n, (ast.AnnAssign, ast.AugAssign)): out |= {x.id for x in ast.walk(n.target) if isinstance(x, ast.Name)}
        elif isinstance(n, (ast.For,)): out |= {x.id for x in ast.walk(n.target) if isinstance(x, ast.Name)}
        elif isinstance(n, ast.With):
            for i in n.items:
                if i.optional_vars: out |= {x.id for x in ast.walk(i.optional_vars) if isinstance(x, ast.Name)}
    for n in ast.walk(node):
        if isinstance(n, ast.NamedExpr) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)): out.add(n.target.id)
    return out
def used(node):
    "Names that a statement reads, strings in annotations included."
    out = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    for n in ast.walk(node):
        for a in [getattr(n, 'annotation', None), getattr(n, 'returns', None)]:
            if a is not None:
                for x in ast.walk(a):
                    if isinstance(x, ast.Constant) and isinstance(x.value, str) and x.value.isidentifier(): out.add(x.value)
    return out - set(dir(builtins))
def segments(src):
    "(node, text) of each top-level statement, comments and decorators before it included."
    lines = src.splitlines(); tree = ast.parse(plain(src)); out = []; last = 0
    for node in tree.body:
        out.append((node, '\n'.join(lines[last:node.end_lineno]))); last = node.end_lineno
    return out

def free(node):
    "Names that a statement needs from outside: `used`, less what it binds itself before."
    u = used(node)
    hide = set()
    for n in ast.walk(node):
        if isinstance(n, ast.arg): hide.add(n.arg)
        if isinstance(n, ast.comprehension): hide |= {x.id for x in ast.walk(n.target) if isinstance(x, ast.Name)}
        if isinstance(n, ast.ExceptHandler) and n.name: hide.add(n.name)
    inner = lambda b: {x.id for x in ast.walk(b) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    for n in ast.walk(node):
        if isinstance(n, (ast.FunctionDef, ast.For, ast.With, ast.If, ast.Try)): hide |= inner(n) | ({n.name} if hasattr(n, 'name') else set())
        if isinstance(n, ast.NamedExpr): hide.add(n.target.id)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): hide.add(n.name)
    return u - hide

class Imports:
    "What import statements provide: name -> ('import', module, as) or ('from', module, name, as)."
    def __init__(self): self.of = {}
    def add(self, node):
        if isinstance(node, ast.Import):
            for a in node.names: self.of[a.asname or a.name.split('.')[0]] = ('import', a.name, a.asname)
        elif isinstance(node, ast.ImportFrom):
            for a in node.names: self.of[a.asname or a.name] = ('from', node.module, a.name, a.asname)
MODULES = set(PLAN) | set(rest.values()) | set(target_of.values())
def resolve(module, name, deep):
    "New place of `from module import name`."
    if not module.startswith('pc_transformer'): return module, name
    old = module.removeprefix('pc_transformer').lstrip('.')
    alias = {'kernels': ('pc_transformer.attention', 'kernels'), 'gpu_kernels': ('pc_transformer.attention.kernels', 'triton'),
             'training': ('pc_transformer', 'training'), 'data': ('pc_transformer', 'data'), 'interop': ('pc_transformer', 'interop'),
             'experiments.components': ('pc_transformer.experiments', 'families'), 'experiments.settling_study': ('pc_transformer.experiments', 'settling'),
             'uncertainty': ('pc_transformer.experiments', 'uncertainty'), 'evidence': ('pc_transformer.experiments', 'evidence')}
    if f'{old}.{name}'.lstrip('.') in alias and done(f'{old}.{name}'.lstrip('.')): return alias[f'{old}.{name}'.lstrip('.')]
    if (f'{old}.{name}'.lstrip('.')) in rest and done(f'{old}.{name}'.lstrip('.')):       # a module
        new = WHERE.get(f'{old}.{name}'.lstrip('.'), rest[f'{old}.{name}'.lstrip('.')])
        return 'pc_transformer.' + new.rsplit('.', 1)[0] if '.' in new else 'pc_transformer', new.rsplit('.', 1)[-1]
    if not done(old) or any(k == f'{old}.{name}' or k.startswith(f'{old}.{name}.') for k in PLAN): return module, name
    new = where(old, name)
    if not deep and not name.startswith('_') and '.' in new and not new.startswith(('experiments', 'theory')): new = FACE(new)
    return 'pc_transformer.' + new, name
def FACE(new): return new.rsplit('.', 1)[0]
def render(items):
    "Import lines from ('import', m, as) and ('from', m, n, as)."
    direct, froms = set(), {}
    for i in items:
        if i[0] == 'import': direct.add((i[1], i[2]))
        else: froms.setdefault(i[1], set()).add(i[2] if i[3] in (None, i[2]) else f'{i[2]} as {i[3]}')
    def kind(m): r = m.split('.')[0]; return 2 if r == 'pc_transformer' else 0 if r in STD else 1
    groups = {0: [], 1: [], 2: []}
    for m, a in sorted(direct): groups[kind(m)].append(f'import {m}' + (f' as {a}' if a else ''))
    for m in sorted(froms):
        line = f'from {m} import ' + ', '.join(sorted(froms[m], key=lambda s: (not s.isupper(), not s[0].isupper(), s)))
        if len(line) > 100:
            words, line, cur = sorted(froms[m], key=lambda s: (not s.isupper(), not s[0].isupper(), s)), f'from {m} import (\n', '   '
            for w in words:
                if len(cur) + len(w) + 2 > 98: line += cur + '\n'; cur = '   '
                cur += f' {w},'
            line += cur + '\n)'
        groups[kind(m)].append(line)
    return '\n\n'.join('\n'.join(g) for g in groups.values() if g)

SRC = {}
for name in NAMES:
    nb = json.load(open(ROOT / f'nbs/{name}.ipynb'))
    exp = next((re.search(r'default_exp\s+(\S+)', text(c))[1] for c in nb['cells'] if c['cell_type'] == 'code' and 'default_exp' in text(c)), None)
    SRC[name] = (exp, nb)
DONE = {exp for exp, _ in SRC.values() if exp}
state = Path('tools/move/done.json')
BEFORE = set(json.load(open(state))) if state.exists() and os.environ.get('KEEP') else set()
def done(old): return old in DONE or old in BEFORE

made = {}      # module -> list of (source name, cells)
heads = {}
for name, (old, nb) in SRC.items():
    imports, defs_target = Imports(), {}
    demo_imports = Imports()
    # which target does each cell belong to
    cells, cur = [], None
    pending = []
    for c in nb['cells']:
        src = text(c)
        if c['cell_type'] == 'code' and 'default_exp' in src: continue
        if exported(c):
            directive = re.search(r'^#\|.*$', src, re.M)[0]
            parts = {}
            nodes = segments(src)
            for node, seg in nodes:
                if isinstance(node, (ast.Import, ast.ImportFrom)): imports.add(node); continue
                ns = bound(node)
                t = where(old, sorted(ns)[0]) if ns else (list(parts)[-1] if parts else cur)
                for n in ns: defs_target[n] = t
                seg = '\n'.join(l for l in seg.splitlines() if not l.startswith('#|'))
                parts.setdefault(t, []).append(seg.strip('\n'))
            if not parts: continue        # an import cell
            first = True
            for t, segs in parts.items():
                sep = '\n\n\n' if any(s.lstrip().startswith(('def ', 'class ', '@')) for s in segs) else '\n'
                body = directive + '\n' + sep.join(segs) + '\n'
                body = body.rstrip('\n')
                new = dict(c); new['source'] = body.splitlines(True); new['id'] = c['id'] if first else nid(c['id'], t)
                if first:
                    for p in pending: cells.append((t, p, 'md'))
                    pending = []
                cells.append((t, new, 'exp')); first = False
            cur = t if len(parts) == 1 else None
            multi = list(parts)
            if cur is None: cur = ('multi', multi)
        elif c['cell_type'] == 'markdown':
            pending.append(c)
        else:
            t = cur
            if isinstance(cur, tuple):
                try: u = used(ast.parse(plain(src)))
                except SyntaxError: u = set()
                score = {t2: sum(defs_target.get(n) == t2 for n in u) for t2 in cur[1]}
                t = max(cur[1], key=lambda t2: score[t2])
            for p in pending: cells.append((t, p, 'md'))
            pending = []
            cells.append((t, c, 'demo'))
    last = cur[1][-1] if isinstance(cur, tuple) else cur
    for p in pending: cells.append((last, p, 'md'))
    # cells before the first export belong to the module that keeps the title
    main = WHERE.get(old, rest.get(old, old))
    cells = [(t or main, c, k) for t, c, k in cells]
    fixed = {}
    for t, c, k in cells: fixed.setdefault(t, [])
    # statement level definitions of the demos, in order
    stmts = []
    for n, (t, c, k) in enumerate(cells):
        if k == 'demo':
            try:
                for node, seg in segments(text(c)):
                    if isinstance(node, (ast.Import, ast.ImportFrom)): demo_imports.add(node)
                    else: stmts.append((n, node, seg))
            except SyntaxError: pass
    for t in fixed:
        mine = [(n, c, k) for n, (t2, c, k) in enumerate(cells) if t2 == t]
        own_defs = {d for d, t2 in defs_target.items() if t2 == t}
        # imports of the exported cells
        need = set()
        for n, c, k in mine:
            if k == 'exp':
                for node, seg in segments(text(c)): need |= used(node)
        items = []
        for u in sorted(need - own_defs):
            if u in defs_target: items.append(('from', 'pc_transformer.' + defs_target[u], u, None))
            elif u in imports.of:
                i = imports.of[u]
                if i[0] == 'from': m, nm = resolve(i[1], i[2], True); items.append(('from', m, nm, i[3] or (i[2] if nm != i[2] else None)))
                else: items.append(i)
        exp_import = render(items)
        provided = {i[3] or i[2] if i[0] == 'from' else (i[2] or i[1].split('.')[0]) for i in items}
        # demos: names needed, closure over statements of the other cells
        have = set(own_defs) | provided
        setup, dneed_imports = [], {}
        inset = set()
        def require(u, before, depth=0):
            if depth > 60: return
            if depth and u not in provided and u not in own_defs and (u in demo_imports.of or u in imports.of):
                dneed_imports[u] = demo_imports.of.get(u) or imports.of[u]; have.add(u); return
            if u in have: return
            if u in demo_imports.of or u in imports.of:
                dneed_imports[u] = demo_imports.of.get(u) or imports.of[u]; have.add(u); return
            if u in defs_target:
                dneed_imports[u] = ('from', 'pc_transformer.' + defs_target[u], u, None); have.add(u); return
            binders = [q for q, (n, node, seg) in enumerate(stmts) if q < before and u in bound(node)]
            flat = [q for q in binders if not isinstance(stmts[q][1], (ast.For, ast.With, ast.If, ast.Try))]
            if not binders: return
            q0 = (flat or binders)[-1]
            have.add(u)
            def take(q):
                if q in inset: return
                inset.add(q); node = stmts[q][1]
                for x in sorted(free(node)): require(x, q, depth + 1)
                have.update(bound(node)); setup.append((q, 0, stmts[q][2]))
            node0 = stmts[q0][1]
            if isinstance(node0, ast.AugAssign) or u in used(node0) and not isinstance(node0, (ast.FunctionDef, ast.ClassDef)) and len(binders) > 1 and isinstance(node0, ast.Assign) and u in {x.id for x in ast.walk(node0.value) if isinstance(x, ast.Name)}:
                have.discard(u); require(u, q0, depth + 1); have.add(u)
            take(q0)
            for q in range(q0 + 1, before):
                node = stmts[q][1]
                if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
                        and isinstance(node.value.func.value, ast.Name) and node.value.func.value.id == u): take(q)
        seq_of = {id(node): q for q, (n, node, seg) in enumerate(stmts)}
        before_cell = {}
        for n, c, k in mine:
            if k != 'demo': continue
            start = len(setup)
            for q, (n2, node, seg) in enumerate(stmts):
                if n2 != n: continue
                for u in sorted(free(node)): require(u, q)
                have |= bound(node)
            if len(setup) > start: before_cell[n] = sorted(setup[start:], key=lambda s: s[:2])
            try:
                for node, seg in segments(text(c)):
                    if isinstance(node, (ast.Import, ast.ImportFrom)): have |= bound(node)
            except SyntaxError: pass
        # the imports that a demo cell of this notebook has itself
        dim = []
        for i in dneed_imports.values():
            if i[0] == 'from': m, nm = resolve(i[1], i[2], False); dim.append(('from', m, nm, i[3] or (i[2] if nm != i[2] else None)))
            else: dim.append(i)
        out = []
        for n, c, k in mine:
            if k == 'demo':      # rewrite own imports of library names
                s = text(c)
                try:
                    for node, seg in segments(s):
                        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('pc_transformer'):
                            new = render([('from', *resolve(node.module, a.name, False), a.asname) for a in node.names])
                            body = '\n'.join(l for l in seg.splitlines() if l.startswith('#'))
                            s = s.replace(seg.strip('\n'), (body + '\n' if body else '') + new)
                except SyntaxError: pass
                if s != text(c): c = dict(c); c['source'] = s.splitlines(True)
            if n in before_cell:
                body = '\n'.join(s.strip('\n') for *_, s in before_cell[n])
                at = len(out)
                if not any(x in own_defs for _, _, s in before_cell[n] for node in ast.parse(plain(s)).body for x in free(node)):
                    while at and (exported(out[at - 1]) or out[at - 1]['cell_type'] == 'markdown') and not text(out[at - 1]).startswith('# '): at -= 1
                out.insert(at, code(body, t, n, 'setup'))
            out.append(c)
        made.setdefault(t, []).append((name, t == main, out, exp_import, render(dim), ''))
    heads[name] = main

def path_of(module): return PLAN[module][0] + '.ipynb'
written = {}
for module, parts in made.items():
    if module not in PLAN: print('NO PLAN for', module, [p[0] for p in parts]); continue
    place, title, promise = PLAN[module]
    cells = []
    for name, is_main, out, exp_import, demo_import, setup in parts:
        head = []
        if is_main and not title:
            while out and out[0]['cell_type'] == 'markdown' and not head: head.append(out.pop(0))
        elif not cells:
            head = [md(f'# {title}\n\n> {promise}', module)]
        cells += head
        if not any('default_exp' in text(c) for c in cells): cells.append(code(f'#| default_exp {module}', module))
        if exp_import: cells.append(code('#| export\n' + exp_import, module, name))
        if demo_import: cells.append(code(demo_import, module, name, 'demo'))
        if setup: cells.append(code('#| hide\n' + setup, module, name, 'setup'))
        cells += out
    depth = place.count('/')
    nb = {'cells': cells, 'metadata': {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}, 'nbformat': 4, 'nbformat_minor': 5}
    written[module] = nb

# links: old notebook -> main new one
for n, place in PLAIN.items():
    if os.environ.get('PLAIN') and (ROOT / f'nbs/{n}.ipynb').exists(): written['plain:' + n] = json.load(open(ROOT / f'nbs/{n}.ipynb'))
_path_of = path_of
def path_of(module): return PLAIN[module[6:]] + '.ipynb' if module.startswith('plain:') else _path_of(module)
link = {f'{n[6:]}.ipynb': path_of(n) for n in written if n.startswith('plain:')} | {f'{n}.ipynb': path_of(heads[n]) for n in NAMES if heads[n] in PLAN}
def relink(s, here):
    up = '../' * here.count('/')
    def one(m):
        target = m[2]
        if target in link:
            new = link[target]
            a, b = (here.rsplit('/', 1)[0] if '/' in here else ''), new.rsplit('/', 1)[0]
            return m[1] + (new.rsplit('/', 1)[1] if a == b else up + new) + (m[3] or '') + ')'
        if re.fullmatch(r'[\w]+\.ipynb', target): return m[1] + up + target + (m[3] or '') + ')'
        return m[0]
    return re.sub(r'(\]\()([\w]+\.ipynb)(#[^)\s]*)?\)', one, s)
for module, nb in written.items():
    here = path_of(module); up = '../' * here.count('/')
    for c in nb['cells']:
        s = text(c)
        s = relink(s, here) if c['cell_type'] == 'markdown' else s
        if up and c['cell_type'] == 'code': s = re.sub(r'(["\'])\.\./', rf'\1{up}../', s)
        if up and c['cell_type'] == 'markdown': s = re.sub(r'\]\(\.\./(?!\d_|index)', f']({up}../', s)
        c['source'] = s.splitlines(True)
    to = ROOT / 'nbs' / here; to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
for name in NAMES: (ROOT / f'nbs/{name}.ipynb').unlink()
for n in written:
    if n.startswith('plain:'): (ROOT / f'nbs/{n[6:]}.ipynb').unlink()

# chapters by name, not by number
title = {}
for old_file, new in link.items():
    nb = json.loads((ROOT / 'nbs' / new).read_text())
    title[old_file[:2]] = (re.search(r'^# (.+)$', '\n'.join(text(c) for c in nb['cells'] if c['cell_type'] == 'markdown'), re.M)[1].strip(), new, next((k for k, v in PLAN.items() if v[0] + '.ipynb' == new), None))
def named(s, here):
    up, a = '../' * here.count('/'), (here.rsplit('/', 1)[0] if '/' in here else '')
    def to(n):
        t, new, _ = title[n]
        return f"[{t}]({new.rsplit('/', 1)[1] if new.rsplit('/', 1)[0] == a else up + new})"
    s = re.sub(r'\[(\d\d)\]\(([^)\s]+)\)', lambda m: f"[{title[m[1]][0]}]({m[2]})" if m[1] in title else m[0], s)
    s = re.sub(r'\[(\d\d) ([^\]]+)\]\(([^)\s]+\.ipynb[^)\s]*)\)', lambda m: f"[{m[2]}]({m[3]})", s)
    s = re.sub(r'\b[Cc]hapters? (?=\[)', '', s)
    def plainly(m):
        return re.sub(r'\d\d', lambda k: to(k[0]) if k[0] in title else k[0], m[1] + m[2])
    return re.sub(r'\b[Cc]hapters? (\d\d)((?:(?:, | and | or | to |, and )\d\d)*)(?!\d)', plainly, s)
def in_code(s):
    s = re.sub(r' \((?:see )?chapters? \d\d(?:(?:, | and | to )\d\d)*\)', '', s)
    say = lambda n: (title[n][2] and f'`{title[n][2]}`') or f'"{title[n][0]}"'
    return re.sub(r'\bchapters? (\d\d)((?:(?:, | and | or | to )\d\d)*)(?!\d)', lambda m: re.sub(r'\d\d', lambda k: say(k[0]) if k[0] in title else k[0], m[1] + m[2]), s)

# everybody else: imports and links
def rewrite_imports(s, deep):
    try: tree = segments(s)
    except SyntaxError: return s
    for node, seg in tree:
        for n in ast.walk(node):
            if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('pc_transformer'):
                items = [('from', *resolve(n.module, a.name, deep), a.asname or None) for a in n.names]
                if any(i[1] != n.module or i[2] != a.name for i, a in zip(items, n.names)):
                    lines = s.splitlines()
                    old = '\n'.join(lines[n.lineno - 1:n.end_lineno])
                    pad = re.match(r'\s*', old)[0]
                    new = '\n'.join(pad + l if l else l for l in render(items).splitlines())
                    if pad == '' or old.lstrip().startswith('from'):
                        s = s.replace(old, new, 1)
                        if 'import gpu_kernels' in old and ' as ' not in old: s = s.replace('gpu_kernels,', 'triton,').replace('gpu_kernels.', 'triton.')
                        return rewrite_imports(s, deep)
    return s
newfiles = {(ROOT / 'nbs' / path_of(m)).resolve() for m in written}
for p in newfiles:
    nb = json.loads(p.read_text())
    for c in nb['cells']:
        if c['cell_type'] == 'code':
            s = rewrite_imports(text(c), bool(exported(c)))
            c['source'] = s.splitlines(True)
    p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
for p in sorted((ROOT / 'nbs').rglob('*.ipynb')):
    if p.resolve() in newfiles or '.ipynb_checkpoints' in p.parts: continue
    nb = json.loads(p.read_text()); here = p.relative_to(ROOT / 'nbs').as_posix(); ch = False
    for c in nb['cells']:
        s = text(c)
        new = relink(s, here) if c['cell_type'] == 'markdown' else rewrite_imports(s, bool(exported(c)))
        if c['cell_type'] == 'markdown' and '/' in here: new = s if not any(k in s for k in link) else relink(s, here)
        if new != s: c['source'] = new.splitlines(True); ch = True
    if ch: p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
for p in sorted((ROOT / 'nbs').rglob('*.ipynb')):
    nb = json.loads(p.read_text()); here = p.relative_to(ROOT / 'nbs').as_posix()
    for c in nb['cells']:
        s = named(text(c), here) if c['cell_type'] == 'markdown' else in_code(text(c)) if exported(c) else text(c)
        c['source'] = s.splitlines(True)
    p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
for p in [*sorted((ROOT / 'tests').rglob('*.py')), *sorted((ROOT / 'tools').glob('*.py')), ROOT / 'pc_transformer/__init__.py']:
    s = p.read_text(); new = rewrite_imports(s, False)
    if new != s: p.write_text(new)
json.dump(sorted(BEFORE | DONE), open(state, 'w'))
print(len(written), 'notebooks:', *(f'{path_of(m)} {len(nb["cells"])}' for m, nb in written.items()), sep='\n  ')
