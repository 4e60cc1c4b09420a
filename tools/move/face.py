"""face.py ROOT pkg 'docstring' mod mod ...: write pc_transformer/pkg/__init__.py"""
import sys
from pathlib import Path
root, pkg, doc, *mods = sys.argv[1:]
p = Path(root)/'pc_transformer'/pkg.replace('.','/'); p.mkdir(parents=True, exist_ok=True)
(p/'__init__.py').write_text(f'"""{doc}"""\n\n' + '\n'.join(f'from .{m} import *' for m in mods) + '\n')
